"""How a question is marked, in a notebook and by grade.py: a line in words, never a traceback and
never the answer.
"""
import contextlib
import math
import re
import sys
import traceback

import torch

def say(text):
    with contextlib.suppress(ValueError, OSError):                   # a student may have closed it
        print(text)

def printable(text, limit=300):
    """text as one line without anything that a terminal could take for a command."""
    clean = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(clean.split())[:limit]

# ==== What went wrong =============================================================================

def place_of(error):
    """Where in a student's cell an exception was raised, in words; '' if in none."""
    for call in reversed(traceback.extract_tb(error.__traceback__)):
        in_jupyter = "ipykernel_" in call.filename or "<ipython-input" in call.filename
        top = call.name == "<module>"
        if call.filename.startswith("<question") or in_jupyter and not top:     # top: our own check
            return f" (line {call.lineno} of the cell{'' if top else ', in ' + call.name})"
    return ""

MEANING = {                                    # what some errors of Python and torch are about
    "does not require grad": "there is no gradient: does it come from something with "
                             "requires_grad_(True), and is nothing detached on the way?",
    "one differentiable number": "the loss has no gradient, or is more than one number: do the "
                                 "weights of your copy have requires_grad_(True)?",
    "backward through the graph a second time": "one gradient uses the graph up: pass "
                                                "retain_graph=True",
    "NoneType": "something is None here: is the return of a function missing?"}

def explain(error, question=""):
    """One printable line about an exception that a student's code, or its check, has raised."""
    try:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, NotImplementedError):
            own = str(error) == f"question {question}" or not str(error).startswith("question")
            return "not answered yet" if own else f"needs {error}, which has no answer that runs"
        if isinstance(error, AssertionError) and str(error):
            return printable(error)
        if isinstance(error, SyntaxError):
            version = ".".join(map(str, sys.version_info[:2]))           # of whoever marks it
            return printable(f"syntax error in line {error.lineno} of the cell: {error.msg} "
                             f"(this is Python {version})")
        if isinstance(error, SystemExit):
            return "the code calls exit()"
        text = next((words for part, words in MEANING.items() if part in text), text)
        return printable(text, 240) + place_of(error)
    except BaseException:
        return "an error that cannot even be printed"

EARNED = {}                                    # id: an error that planted_bug raised, and points

def raised_with(error, earned):
    """Only what is noted here earns anything; an error of a student's own may say what it likes."""
    EARNED.clear()
    EARNED[id(error)] = error, earned

def points(error, worth):
    """What a question still earns after an error; planted_bug says what it leaves or takes off."""
    _, earned = EARNED.get(id(error), (error, 0))
    return min(max(worth + earned if earned < 0 else earned, 0), worth)

@contextlib.contextmanager
def plain_torch():
    """A check is written for torch as it starts up, whatever a cell may have set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)

@contextlib.contextmanager
def marked(question, worth):
    """Around a check in a notebook: a line in place of a traceback, and Run All goes on."""
    try:
        with plain_torch():
            yield
    except (Exception, SystemExit) as error:
        earned = points(error, worth)
        say(f"{question}: {earned} of {worth} points: {explain(error, question)}")

@contextlib.contextmanager
def picture():
    """Around a picture of what students write: where it cannot be drawn yet, a line instead."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")            # half of it would be shown
        say(f"no picture yet: {explain(error)}")

# ==== Predictions: on record before their run =====================================================

RECORDED = {}                                  # question: (prediction, reason), since the start

def shown(value):
    return value if isinstance(value, str) else f"{value:.4g}"

# Told to whoever was right; it stands here since a check cell is read before it is run.
BECAUSE = {
    "1.4": "a is already down to sqrt(1/2) when the integral of beta reaches log 2 = 0.69, and "
           "beta grows to 20: most of the time axis is mostly noise",
    "2.4": "the loss of the exact score is {low:.2f} at t = 0.05 and {high:.4f} at t = 0.95",
    "3.4": "the spread is {full:.2f} with the score and {half:.2f} with half of it",
    "4.5": "under this model all images are equally likely, simple ones included",
    "5.5": "e is {length:.4f} times as long as that of the kept data, and the cosine between the "
           "two is {cosine:.2f}",
    "5.6": "the length grows by a factor of {growth:.3g}; the minimiser is e_g - R/2 e_f with R = "
           "(1 - alpha)/alpha p_f/p_g",
    "6.1": "in strong noise almost everything one sees is noise, so it is easy to name; a forget "
           "loss at such noise works against something that every image needs",
    "7.3": "the mean of the fillings is {mean:.2f}",
    "8.1": "even to claim less than 1% you need some 400 samples without a single hit",
    "8.4": "the judge's own errors are a floor, below which no model can be reported unless it "
           "draws digits that are easier to read",
    "8.6": "no density with that value on D_f can do better than {limit:.2f} on D_g; how a "
           "paper can come to print such numbers is yours to explain",
    "9.2": "the error of 16 steps is {plain:.2g} nats for the plain Gaussian and {turned:.2g} for "
           "the turned one",
    "9.5": "{coarse:.1f} bits/dim with a standard error of {error:.1f} at 16 steps, {fine:.1f} at "
           "64; that error is of the choice of images, not of the integral",
    "10.1": "the judge is sure of a digit in {share:.0%} of the images of noise; it was never "
            "shown anything else",
    "10.5": "every image that was replaced shows up there, and the ratio alone would have praised "
            "the model"}

# After the letter that was chosen: "b: it is a bit larger" holds no other one, "a) or b)" does.
OTHER_LETTER = r"(?<![^\s(,])([bc]\b|a(?=\s*([).,:;/?!]|$)|\s+(or|and)\b))"
NO_REASON = r"(and )?why, in a sentence( or two)?|why must a report have this column"
UNPARTED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"    # Thai to Chinese

def is_reason(text):
    """Three words that differ, or seven letters of a script that does not part words, and not the
    words of the cell as it was handed out: whether they make sense is for a teacher to say."""
    words = {word.lower() for word in re.findall(r"[^\W\d_]+", text)}
    unparted = re.findall(rf"[{UNPARTED}]", text)
    ours = re.fullmatch(rf"\W*({NO_REASON})\W*", text.lower())
    long = len(words) >= 3 and sum(map(str.isalnum, text)) >= 7
    return not ours and (long or len(unparted) >= 7 and len({*unparted}) >= 4)

def record(question, said, why, number=False):
    """A prediction, a letter or else a number -> the same, tidied. Without one, or without a reason
    for it, there is no run; and whoever predicts something else gives another reason."""
    variable = f"why_{question.replace('.', '_')}"
    if said is None or isinstance(said, str) and not said.strip():
        raise NotImplementedError(f"question {question}")
    if number:
        value = math.nan
        if not isinstance(said, str):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                value = float(said.item() if hasattr(said, "item") else said)
        comma = " (a decimal point, not a comma)" if isinstance(said, tuple) else ""
        assert math.isfinite(value), f"answer with a number, not {said!r}{comma}"
    else:
        found = re.match(r"\W*([abc])\W*($|[):.,])(.*)", str(said).lower(), re.S)
        another = found and re.search(OTHER_LETTER, found[3])
        assert found and not another and isinstance(said, str), \
            f"answer with one of the letters a, b, c, not {said!r}"
        value = found[1]
    reason = why.strip() if isinstance(why, str) else ""
    assert is_reason(reason), \
        f"say in {variable}, in a sentence, why you think so: without a reason, of three words " \
        "or more, a prediction earns nothing"
    before = RECORDED.get(question, (value, ""))
    assert before[0] == value or before[1] != reason, \
        f"you predicted {shown(before[0])} before, now {shown(value)}: change the reason in " \
        f"{variable}, too"
    RECORDED[question] = (value, reason)
    say(f"{question}: on record before the run: {shown(value)}, because: {printable(reason)}")
    return value

def compare(question, said, measured, tol=None, **values):
    """What record returned against the run: a letter or, with tol, a number. Whoever is wrong does
    not learn the answer, which could be typed in; values: for the words to whoever is right."""
    right, percent = said == measured, ""
    if tol is not None:
        right = abs(said - measured) <= tol
        if 0 < measured < 1.1 and said > 5 * measured and abs(said / 100 - measured) <= tol:
            percent = " Is that a percentage? Write a fraction."
    assert right, f"you predicted {shown(said)}, and the run disagrees.{percent} Try it out in a " \
        "cell of your own; if you change your mind, change your reason, too"
    say(f"Right: {BECAUSE[question].format(**values)}.")

# ==== Planted bugs: a point for the line, the others for the function =============================

# Every line in which a bug can be put right; it was planted in the first one.
BUG_LINES = {"1.5": (6, 8), "3.3": (4, 3), "4.4": (6, 5), "5.2": (4, 5, 6), "5.3": (6, 5),
             "6.2": (15, 18), "7.2": (5, 2, 3, 4), "8.3": (6, 7)}

@contextlib.contextmanager
def planted_bug(line, question):
    """Around the checks of a function with a bug. What it does wrong is told to everyone, why only
    to those who have found the line."""
    numbers = re.findall(r"\d+", str(line).removesuffix(".0"))       # 6, "6", 6.0, "line 6"
    named = len(numbers) == 1 and int(numbers[0]) > 0
    found = named and int(numbers[0]) in BUG_LINES[question]
    variable = f"line_{question.replace('.', '_')}"
    try:
        yield
    except Exception as error:
        raised_with(error, int(found))
        if found or not isinstance(error, AssertionError):
            raise
        symptom = getattr(error, "symptom", str(error).partition(": ")[0])
        hint = f"line {numbers[0]} is not" if named else f"put its number into {variable}"
        raise AssertionError(f"{symptom}; which line is to blame? {hint}") from None
    if not found:
        named = f"; line {numbers[0]} was not" if named else ""
        error = AssertionError("the function is right now; for the last point put the number of "
                               f"the line that was wrong into {variable}{named}")
        raised_with(error, -1)
        raise error
