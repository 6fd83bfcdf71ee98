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

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]   # marking.py, make.py, sgu.py

import make
import sgu
from marking import explain, points, printable

SOURCES = sorted((HERE / "src").glob("*.py"))


class Shell:
    """What a cell's magics and commands call here in place of IPython: statements that are timed or
    captured run, everything else does nothing."""

    def __init__(self, space, name):
        self.space, self.name = space, name

    def run_line_magic(self, magic, line, *args):
        if magic == "time":
            run_cell(line, self.space, self.name)

    def run_cell_magic(self, magic, line, cell):
        if magic in ("time", "timeit", "capture", "prun"):
            run_cell(cell, self.space, self.name)

    def getoutput(self, *args, **kw):          # of no command; what reads its first line goes on
        return [""]

    def __getattr__(self, name):
        return lambda *args, **kw: None


def python_of(code):
    """A cell as IPython would run it: %magics, !commands and torch.randn? become calls."""
    try:
        from IPython.core.inputtransformer2 import TransformerManager
    except ImportError:
        return code
    return TransformerManager().transform_cell(code)


def run_cell(code, space, name):
    """Run a cell in space, as Jupyter would."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    space["get_ipython"] = lambda: Shell(space, name)
    waiting = eval(compile(python_of(code), name, "exec", flags=flags), space)
    if waiting is not None:                    # an await outside of functions
        asyncio.run(waiting)


def run_step(question, cells, check, space, worth):
    """Run a student's cells [(is it the answer?, code)], then the check if given. -> points, and
    'passed' or one line that says what is wrong."""
    name = f"<question {question}>"
    for answer, code in cells:
        try:
            run_cell(code, space, name)
        except BaseException as error:
            if answer:
                return 0, explain(error, question)
    try:
        run_cell(check, space, "<check>")
        return worth, "passed"
    except BaseException as error:
        return points(error, worth), explain(error, question)


def text_of(path):
    """The text of a notebook, which should be UTF-8; what an editor made of it is read, too."""
    data = pathlib.Path(path).read_bytes()
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        print(f"{printable(path)} is not UTF-8 and was read as Latin-1; save it anew in Jupyter")
        return data.decode("latin-1")


def code_cells(path):
    """A notebook -> [(tag, code)] of its code cells, and the names that may tell which it is."""
    try:
        notebook = json.loads(text_of(path))
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
    after each what it earned, how it went, and the student's reason."""
    os.chdir(HERE)
    if hasattr(os, "setsid"):
        os.setsid()                            # what a student starts ends with this process
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os.environ["MPLBACKEND"], space = "Agg", {"__name__": "__main__", "display": print}
    for i, (question, cells, check, worth) in enumerate(steps):
        check = check if i >= first else ""
        earned, said = (0, "") if i in skip else run_step(question, cells, check, space, worth)
        why = space.get("why_" + str(question).replace(".", "_"))
        pipe.send((i, earned, said, "" if why is None else printable(why) or "(empty)"))
    os._exit(0)


def outcomes(steps, limit):
    """How every step went: [(points, what the check said, the student's reason)].

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
                at, *line = ours.recv()
                if at >= first:
                    lines[at], first = line, at + 1
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
            lines.update({i: (0, end, "") for i in range(first, upto)})
            first = upto
        skip.add(at)
    return [lines[i] for i in range(len(steps))]


def grade(path, limit=120.):
    """Print a line per question of a student's notebook, and the total. -> (points, possible)."""
    steps, total = grading_steps(path), 0
    lines = outcomes(steps, limit)
    print(printable(pathlib.Path(path).name))
    for (question, cells, _, worth), (earned, said, why) in zip(steps, lines):
        if question:
            said = said if cells else "the cell with the answer is missing"
            earned = earned if cells else 0
            total += earned
            print(f"  {question}  {earned}/{worth}  {said}" + (f"; why: {why}" if why else ""))
        elif said != "passed":
            print(f"  the notebook's own cell: {said}")
    possible = sum(step[3] for step in steps)
    print(f"  total  {total}/{possible}", flush=True)
    return total, possible


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
