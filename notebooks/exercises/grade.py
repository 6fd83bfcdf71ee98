"""Grade exercise notebooks: a line per question and a total, see ../README.md.

    python notebooks/exercises/grade.py FILE.ipynb ...        --limit SECONDS a question (120)

Student code runs in a process of its own. It is no sandbox: strangers' notebooks belong into a
container. Exit code 0, or 2 if a file is no exercise.
"""
import argparse
import ast
import asyncio
import contextlib
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import sys
import traceback

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]   # checks.py, make.py, sgu.py

import make
import sgu

SOURCES = sorted((HERE / "src").glob("*.py"))


def printable(text, limit=300):
    """text as one line without anything that a terminal could take for a command."""
    clean = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(clean.split())[:limit]


def explain(error, name):
    """One printable line about an exception that a student's cell, called name, has raised."""
    try:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, NotImplementedError):
            own = str(error) == name.strip("<>") or not str(error).startswith("question")
            text = "not answered yet" if own else f"needs {error}, which is not answered yet"
        elif isinstance(error, AssertionError):
            text = str(error)
        elif isinstance(error, SyntaxError):
            text = f"syntax error in line {error.lineno} of the cell: {error.msg}"
        elif isinstance(error, SystemExit):
            text = "the code calls exit()"
        else:
            if "does not require grad" in text:
                text = ("the loss has no gradient: do the weights of your copy have "
                        "requires_grad_(True), and is nothing detached?")
            calls = traceback.extract_tb(error.__traceback__)
            lines = [f", line {f.lineno} of the cell" for f in calls if f.filename == name]
            text += "".join(lines)[:40]
    except BaseException:
        text = "an error that cannot even be printed"
    return printable(text)


def python_of(code):
    """A cell without what belongs to Jupyter: %magics, !commands, questions such as torch.randn?;
    a name that a command's output is given to becomes None."""
    try:
        compile(code, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except (SyntaxError, ValueError):
        code = re.sub(r"(?m)^([ \t]*)(%%?[A-Za-z]|!|\?).*", r"\1pass", code)
        code = re.sub(r"(?m)^([ \t]*)[\w.]+\?{1,2}[ \t]*$", r"\1pass", code)
        code = re.sub(r"(?m)^([ \t]*\w+[ \t]*=)[ \t]*[!%].*", r"\1 None", code)
    return code


def run_cell(code, space, name):
    """Run a cell in space, as Jupyter would."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    waiting = eval(compile(python_of(code), name, "exec", flags=flags), space)
    if waiting is not None:                    # an await outside of functions
        asyncio.run(waiting)


def run_step(question, cells, check, space):
    """Run a student's cells [(is it the answer?, code)], then the check if given. -> 'passed', or
    one line that says what is wrong."""
    name = f"<question {question}>"
    for answer, code in cells:
        try:
            run_cell(code, space, name)
        except BaseException as error:
            if answer:
                return explain(error, name)
    try:
        run_cell(check, space, "<check>")
        return "passed"
    except BaseException as error:
        return explain(error, name)


def code_cells(path):
    """A notebook -> [(tag, code)] of its code cells, and the names that may tell which it is."""
    try:
        notebook = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig", errors="replace"))
        cells = [(str(c.get("metadata", {}).get("sgu", "")), "".join(c["source"]))
                 for c in notebook["cells"] if c["cell_type"] == "code"]
        return cells, (str(notebook.get("metadata", {}).get("sgu", "")), pathlib.Path(path).name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = printable(f"{type(error).__name__}: {error}", 100)
        raise sgu.UsageError(f"{path} is not a notebook ({reason})") from None


def grading_steps(path):
    """A student's notebook -> [(question, cells, check, points)]. Checks and the notebook's own
    cells are taken from the source. Cells are known by their metadata or else their first line;
    cells that a student added run before the check that follows them."""
    cells, names = code_cells(path)
    if not SOURCES:
        raise sgu.UsageError("the grader needs notebooks/exercises/src, which this copy lacks")
    source = next((s for name in names for s in SOURCES if name.startswith(s.stem)), None)
    if source is None:
        raise sgu.UsageError(f"{path} is none of our exercises; keep its name, or start again from "
                             "notebooks/exercises")
    original, mine, extra = make.read_source(source), {}, []
    texts = {cell["text"].strip() for cell in original}
    for tag, code in cells:
        first = re.match(r"# (question|check of question) (\d+\.\d+)", code)
        if first and not tag:
            tag = f"{'answer' if first[1] == 'question' else 'check'} {first[2]}"
        kind, _, question = tag.partition(" ")
        if kind == "answer":
            mine[question] = mine.get(question, []) + extra + [(True, code)]
        elif kind == "check" and extra:
            mine[question] = mine.get(question, []) + extra
        elif kind in ("", "setup") and code.strip() not in texts:
            extra.append((False, code))
        if kind in ("answer", "check"):
            extra = []
    steps = []
    for c in original:
        if c["kind"] == "setup":
            steps.append((None, [(True, c["text"])], "", 0))
        elif c["kind"] == "check":
            steps.append((c["question"], mine.get(c["question"], []), c["text"], c["points"]))
    return steps


def grade_worker(pipe, steps, first, skip):
    """In a process of its own: run steps, without checks before first, none of skip, and tell pipe
    after each how it went."""
    os.chdir(HERE)
    if hasattr(os, "setsid"):
        os.setsid()                            # what a student starts ends with this process
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os.environ["MPLBACKEND"], space = "Agg", {"__name__": "__main__", "display": print}
    for i, (question, cells, check, _) in enumerate(steps):
        said = "" if i in skip else run_step(question, cells, check if i >= first else "", space)
        why = space.get("why_" + str(question).replace(".", "_"))
        pipe.send((i, said, "" if why is None else printable(why) or "(empty)"))
    os._exit(0)


def outcomes(steps, limit):
    """How every step went: [(what the check said, the student's reason)].

    Where the process ends or hangs, another one runs the earlier cells again, without that
    question, and goes on.
    """
    first, skip, lines = 0, set(), {}
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    while first < len(steps):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=grade_worker, args=(theirs, steps, first, skip))
        process.start()
        theirs.close()
        at = 0
        try:
            while at < len(steps):
                if not ours.poll(limit if steps[at][0] else 5 * limit):
                    raise TimeoutError
                at, said, why = ours.recv()
                if at >= first:
                    lines[at], first = (said, why), at + 1
                at += 1
        except TimeoutError:
            end = f"no result after {limit:g} s (an endless loop?)"
        except (EOFError, OSError, ValueError, TypeError, pickle.UnpicklingError):
            process.join(1)
            end = f"the code ended its process (exit code {process.exitcode})"
        finally:
            with contextlib.suppress(AttributeError, OSError):
                os.killpg(process.pid, signal.SIGKILL)               # what cells have started, too
            process.kill()
            process.join()
        if first < len(steps) and (at >= first or at in skip):       # in skip: no way past it
            upto = len(steps) if at in skip else at + 1
            lines.update({i: (end, "") for i in range(first, upto)})
            first = upto
        skip.add(at)
    return [lines[i] for i in range(len(steps))]


def grade(path, limit=120.):
    """Print a line per question of a student's notebook, and the total. -> (points, possible)."""
    steps, points = grading_steps(path), 0
    said_of = outcomes(steps, limit)
    print(printable(pathlib.Path(path).name))
    for (question, cells, _, worth), (said, why) in zip(steps, said_of):
        if question:
            said = said if cells else "the cell with the answer is missing"
            got = worth * (said == "passed")
            points += got
            print(f"  {question}  {got}/{worth}  {said}" + (f"; why: {why}" if why else ""))
        elif said != "passed":
            print(f"  the notebook's own cell: {said}")
    total = sum(step[3] for step in steps)
    print(f"  total  {points}/{total}", flush=True)
    return points, total


def main(argv=None):
    parser = argparse.ArgumentParser(prog="grade.py", description="Grade exercise notebooks.")
    parser.error = lambda message: parser.exit(2, f"grade: {message}\n")
    parser.add_argument("files", nargs="+", metavar="FILE.ipynb")
    parser.add_argument("--limit", type=float, default=120., metavar="SECONDS",
                        help="time limit per question (default 120)")
    opt, code = parser.parse_args(argv), 0
    for path in opt.files:
        try:
            grade(path, opt.limit)
        except sgu.UsageError as error:
            print(f"grade: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")                     # a terminal without UTF-8
    sys.exit(main())
