"""Grade exercise notebooks: a line per question and a total, see ../README.md.

    python notebooks/exercises/grade.py FILE.ipynb ...        --limit SECONDS a question (120)

Student code runs in a process of its own. It is no sandbox: strangers' notebooks belong into a
container. Exit code 0, or 2 if a file is no exercise.
"""
import argparse
import ast
import asyncio
import collections
import contextlib
import itertools
import json
import linecache
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import sys
import types

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]   # marking.py, make.py, sgu.py

import checks
import make
import marking
import sgu
import toy_gmm
from marking import explain, plain_torch, points, printable

SOURCES = sorted((HERE / "src").glob("*.py"))
LONG = 5                                       # times the limit: for our own cells, and for SLOW
SLOW = ("6.4",)                                # says of itself that it takes minutes

# cells: [(which, code)], which is True for the answer, False for another cell of the student's,
# None for a picture that came with the notebook. stub: the function as it was handed out.
Step = collections.namedtuple("Step", "question cells check points stub")


class Shell:
    """What a cell's magics and commands call here in place of IPython: statements that are timed or
    captured run, everything else does nothing."""

    def __init__(self, space, name):
        self.space, self.name = space, name

    def run_line_magic(self, magic, line, *args):
        if magic != "time":
            return None
        try:
            code = compile(line.strip(), self.name, "eval")
        except SyntaxError:                    # a statement
            return run_cell(line, self.space, f"{self.name} {line}")
        return eval(code, self.space, sys._getframe(1).f_locals)

    def run_cell_magic(self, magic, line, cell):
        if magic in ("time", "timeit", "capture", "prun"):
            run_cell(cell, self.space, f"{self.name} {magic}")

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


def give_shell(shell):
    """Let cells, and nobody else, get the shell from IPython, too."""
    def get_ipython():
        asks = sys._getframe(1).f_code.co_filename
        return shell if asks.startswith("<question") else None
    for module in ("IPython", "IPython.core.getipython"):
        if module in sys.modules:
            sys.modules[module].get_ipython = get_ipython


def run_cell(code, space, name):
    """Run a cell in space, as Jupyter would."""
    code, flags = python_of(code), ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name
    shell = Shell(space, name)
    space["get_ipython"] = lambda: shell
    give_shell(shell)
    waiting = eval(compile(code, name, "exec", flags=flags), space)
    if waiting is not None:                    # an await outside of functions
        asyncio.run(waiting)


@contextlib.contextmanager
def modules_as_before():
    """What is put into our modules does not stay there: a check must not depend on it."""
    before = {module: dict(vars(module)) for module in (checks, marking, sgu, toy_gmm)}
    try:
        yield
    finally:
        for module, names in before.items():
            vars(module).update(names)


def changed(names, before):
    """Those of the names that are new or mean something else than before."""
    return {name: value for name, value in names.items() if before.get(name) is not value}


def run_step(question, cells, check, space, worth, ours=types.MappingProxyType({})):
    """Run a student's cells in space, then the check if given, to which a name in ours means what
    it means there. -> points, and 'passed' or one line that says what is wrong."""
    wrong = None
    with modules_as_before():
        for i, (which, code) in enumerate(cells):
            try:
                run_cell(code, space, f"<question {question}, cell {i}>")
            except BaseException as error:
                if which:
                    wrong = explain(error, question)
    if wrong:
        return 0, wrong
    before = {**space, **ours}
    scope = dict(before)
    try:
        with modules_as_before(), plain_torch():
            run_cell(check, scope, "<check>")
        return worth, "passed"
    except BaseException as error:
        return points(error, worth), explain(error, question)
    finally:                                   # pictures that follow show what the check has made
        space.update(changed(scope, before))


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
    def tag(thing):
        metadata = thing.get("metadata")
        return str(metadata.get("sgu") or "") if isinstance(metadata, dict) else ""
    try:
        notebook = json.loads(text_of(path))
        cells = [(tag(cell), "".join(cell.get("source") or "")) for cell in notebook["cells"]
                 if cell.get("cell_type") == "code"]
        return cells, (tag(notebook), pathlib.Path(path).name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = printable(f"{type(error).__name__}: {error}", 100)
        raise sgu.UsageError(f"{path} is not a notebook ({reason})") from None


def kind_of(tag, code):
    """What a cell is, and of which question: by its metadata, or else by its first line."""
    first = re.match(r"\s*# (question|check of question) (\d+\.\d+)", code)
    if first and not tag:
        return "answer" if first[1] == "question" else "check", first[2]
    kind, _, question = tag.partition(" ")
    return kind, question


def source_of(cells, names):
    """The file that a notebook was made from: by a name that holds its stem, or else by the
    questions that most cells belong to. None if there is none."""
    numbers = collections.Counter(question.partition(".")[0].zfill(2)
                                  for _, question in itertools.starmap(kind_of, cells) if question)
    by_name = [source for name in names for source in SOURCES if source.stem in name]
    by_cells = [source for number, _ in numbers.most_common(1) for source in SOURCES
                if source.stem.startswith(f"{number}_")]
    return next(iter(by_name + by_cells), None)


def grading_steps(path):
    """A student's notebook -> a Step for each question, and for each cell that everything needs,
    which is taken from the source like the checks. Cells that a student added or has written over,
    and pictures, run before the check that follows them."""
    cells, names = code_cells(path)
    if not SOURCES:
        raise sgu.UsageError("the grader needs notebooks/exercises/src, which this copy lacks")
    source = source_of(cells, names)
    if source is None:
        raise sgu.UsageError(f"{path} is none of our exercises; keep its name, or start again from "
                             "notebooks/exercises")
    original, mine, extra = make.read_source(source), collections.defaultdict(list), []
    setups, pictures = ({c["text"].strip() for c in original if c["kind"] == kind}
                        for kind in ("setup", "look"))
    for tag, code in cells:
        kind, question = kind_of(tag, code)
        written_over = kind == "check" and not code.lstrip().startswith("# check of question")
        if kind in ("", "setup", "look") and code.strip() not in setups or written_over:
            extra.append((None if code.strip() in pictures else False, code))
        if kind in ("answer", "check"):
            mine[question] += extra + [(True, code)] * (kind == "answer")
            extra = []
    steps, stubs = [], {}
    for c in original:
        question, text = c["question"], c["text"]
        if c["kind"] == "student" and "raise NotImplementedError" in text:
            stubs[question] = text
        if c["kind"] == "setup":
            steps.append(Step(None, [(True, text)], "", 0, ""))
        elif c["kind"] == "check":
            stub = stubs.get(question, "")
            steps.append(Step(question, mine[question], text, c["points"], stub))
    return steps


def grade_worker(pipe, steps, first, skip):
    """In a process of its own: run steps, without checks before first, none of skip, and tell pipe
    after each what it earned, how it went, and the student's reason."""
    os.chdir(HERE)
    if hasattr(os, "setsid"):
        os.setsid()                            # what a student starts ends with this process
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os.environ["MPLBACKEND"] = "Agg"
    sys.modules["__main__"] = types.ModuleType("__main__")           # as in Jupyter, for pickle
    space, ours = vars(sys.modules["__main__"]), {"__name__": "__main__"}
    space["display"] = print
    for i, step in enumerate(steps):
        earned, said = 0, ""
        if step.question is None:              # its functions see no name that a student changes
            before = dict(ours)
            earned, said = run_step(None, step.cells, "", ours, 0)
            space.update(changed(ours, before))
        elif i not in skip:
            earned, said = run_step(step.question, step.cells, step.check if i >= first else "",
                                    space, step.points, ours)
        if step.stub:                          # who needs what is missing learns where it belongs
            handed_out = space | ours
            run_cell(step.stub, handed_out, "<handed out>")
            space.update((name, handed_out[name]) for name in handed_out.keys() - space.keys())
        why = space.get("why_" + str(step.question).replace(".", "_"))
        pipe.send((i, earned, said, "" if why is None else printable(why) or "(empty)"))
    os._exit(0)


def outcomes(steps, limit):
    """How every step went: [(points, what the check said, the student's reason)].

    Where the process ends or hangs, another one runs the earlier cells again, and goes on with the
    answer to that question alone, and then without that question.
    """
    first, skip, lines, steps = 0, set(), {}, list(steps)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    while first < len(steps):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=grade_worker, args=(theirs, steps, first, skip))
        process.start()
        theirs.close()
        at = 0
        try:
            while at < len(steps):
                question = steps[at].question
                seconds = limit * (LONG if question is None or question in SLOW else 1)
                if not ours.poll(seconds):
                    raise TimeoutError
                at, *line = ours.recv()
                if at >= first:
                    lines[at], first = line, at + 1
                at += 1
        except TimeoutError:
            end = f"no result after {seconds:g} s (an endless loop?)"
        except (EOFError, OSError, ValueError, TypeError, pickle.UnpicklingError):
            process.join(1)
            end = f"the code ended its process (exit code {process.exitcode})"
        finally:
            with contextlib.suppress(AttributeError, OSError):
                os.killpg(process.pid, signal.SIGKILL)               # what cells have started, too
            process.kill()
            process.join()
        if first == len(steps):
            break
        answer = [cell for cell in steps[at].cells if cell[0]]
        if at not in skip and answer != steps[at].cells:
            steps[at] = steps[at]._replace(cells=answer)
            continue
        if at >= first or at in skip:                                # in skip: no way past it
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
    for step, (earned, said, why) in zip(steps, lines):
        if step.question:
            if not earned and all(which is None for which, _ in step.cells):
                said = "the cell with the answer is missing"
            total += earned
            why = f"; why: {why}" if why else ""
            print(f"  {step.question}  {earned}/{step.points}  {said}{why}")
        elif said != "passed":
            print(f"  the notebook's own cell: {said}")
    possible = sum(step.points for step in steps)
    print(f"  total  {total}/{possible}", flush=True)
    return total, possible


def seconds(text):
    """A time limit; a day is more than enough, and what no clock can wait for is an error."""
    if not 0 < float(text) <= 86400:
        raise ValueError
    return float(text)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="grade.py", description="Grade exercise notebooks.")
    parser.error = lambda message: parser.exit(2, f"grade: {message}\n")
    parser.add_argument("files", nargs="+", metavar="FILE.ipynb")
    parser.add_argument("--limit", type=seconds, default=120., metavar="SECONDS",
                        help="time limit per question (default 120)")
    opt, code = parser.parse_args(argv), 0
    if not __debug__:
        parser.error("python -O (or PYTHONOPTIMIZE) removes what the checks assert; run it without")
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
