"""Everything that is generated, by one command each. Run from the repository's top folder.

    python notebooks/make.py readme       fill the tables of README.md from notebooks/results/*.json
    python notebooks/make.py run          execute every notebook (SGU_QUICK=1: tiny sizes), fail on the first error
    python notebooks/make.py run --save   the same, and keep the outputs in the notebooks; run 02 05: only these
    python notebooks/make.py exercises    exercises/src/*.py -> exercises/*.ipynb, for students, and *_solution.ipynb
    python notebooks/make.py grade-all    every solution gets full points, every notebook as handed out gets none
"""
import json, pathlib, re, sys, time

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))


def filled_readme():
    """README.md with every block <!-- results: NAME --> ... <!-- end --> made anew from notebooks/results/NAME.json."""
    import sgu

    def block(match):
        results = json.loads((here / "results" / f"{match[1]}.json").read_text())
        table = results["markdown"] if "markdown" in results else sgu.make_table(results)
        return f"<!-- results: {match[1]} -->\n{table.strip()}\n<!-- end -->"

    def number(match):
        value = json.loads((here / "results" / f"{match[1]}.json").read_text())
        for key in match[2].split("."):
            value = value[key]
        text = f"{value / 60:.1f} min" if match[3] == "min" else format(value, match[3])
        return f"<!-- number: {match[1]} {match[2]} {match[3]} -->{text}<!-- end -->"

    text = (here.parent / "README.md").read_text()
    text = re.sub(r"<!-- results: (\S+) -->.*?<!-- end -->", block, text, flags=re.S)
    return re.sub(r"<!-- number: (\S+) (\S+) (\S+) -->.*?<!-- end -->", number, text, flags=re.S)


def run_notebooks(save, chosen=()):
    """Execute every notebook (or those whose numbers are chosen) from a clean kernel, in the order of their names, in the folder it lies in."""
    import nbformat
    from nbclient import NotebookClient
    for path in sorted(here.glob("*.ipynb")):
        if chosen and path.name[:2] not in chosen:
            continue
        start, notebook = time.time(), nbformat.read(path, as_version=4)
        print(f"{path.relative_to(here.parent)} ...", end=" ", flush=True)
        NotebookClient(notebook, timeout=7200 if save else 900, resources={"metadata": {"path": str(path.parent)}}).execute()
        print(f"{time.time() - start:.0f} s", flush=True)
        if save:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)           # time stamps: nothing but noise in a diff
            nbformat.write(notebook, path)


def read_source(path):
    """A file of exercises/src -> its cells, dicts of kind (markdown, setup, look, student, solution, check), question, points, words, text.

    Each cell starts with a line # %% that says its kind; README.md of this folder lists them. words: what the check of an
    unmended bug must say. only: 'solution' for a markdown cell that students do not get.
    """
    cells = []
    for part in re.split(r"(?m)^# %%", pathlib.Path(path).read_text())[1:]:
        head, _, text = part.partition("\n")
        match = re.fullmatch(r" *(?P<kind>\[markdown\]|look|student|solution|check|)"
                             r" *(?P<question>\d+\.\d+)?(?: \((?P<points>\d+) points?\))?(?: bug: (?P<words>.+))?(?P<only>solution)?", head)
        if not match or (match["kind"] in ("student", "solution", "check")) != bool(match["question"]) or (match["kind"] == "check") != bool(match["points"]):
            raise SystemExit(f"{path}: cannot read the line '# %%{head}'")
        cell = match.groupdict() | dict(kind=match["kind"].strip("[]") or "setup", points=int(match["points"] or 0), text=text.strip("\n"))
        if cell["kind"] == "markdown":
            cell["text"] = re.sub(r"(?m)^# ?", "", cell["text"])
        cells.append(cell)
    return cells


def exercise_notebook(path, solution):
    """The notebook of a file of exercises/src as a dict: what students get, or the solution."""
    cells = []
    for i, cell in enumerate(read_source(path)):
        kind, q = cell["kind"], cell["question"]
        if kind == ("student" if solution else "solution") or (cell["only"] and not solution):
            continue
        name = dict(student="answer", solution="answer").get(kind, kind)
        title = dict(answer=f"# question {q}: your answer\n", check=f"# check of question {q}: run it, do not change it\n").get(name, "")
        out = dict(id=f"{name}-{q.replace('.', '-') if q else i}", metadata={"sgu": f"{name} {q}" if q else name})
        if kind == "markdown":
            out.update(cell_type="markdown", metadata={})
        else:
            out.update(cell_type="code", execution_count=None, outputs=[])
        if kind == "check":
            cell = cell | dict(text=f"{cell['text']}\nprint('{q}: {cell['points']} of {cell['points']} points')")
        cells.append(out | dict(source=(title + cell["text"]).splitlines(keepends=True)))
    return dict(cells=cells, metadata=dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"), language_info=dict(name="python"),
                                           sgu=pathlib.Path(path).stem), nbformat=4, nbformat_minor=5)


def exercise_notebooks():
    """{path of a notebook: its content} for every file of exercises/src."""
    folder = here / "exercises"
    return {folder / (source.stem + suffix + ".ipynb"): exercise_notebook(source, bool(suffix))
            for source in sorted((folder / "src").glob("*.py")) for suffix in ("", "_solution")}


def grade_all():
    """Grade all exercise notebooks; exit code 1 unless solutions get full points and what students get gets none."""
    import test_sgu
    wrong = []
    for path in exercise_notebooks():
        start, (points, total) = time.time(), test_sgu.grade(path, limit=300)
        print(f"   {time.time() - start:.0f} s", flush=True)
        if points != (total if path.stem.endswith("_solution") else 0):
            wrong.append(path.name)
    sys.exit(f"wrong points: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    command = sys.argv[1:] or [""]
    if command[0] == "readme":
        (here.parent / "README.md").write_text(filled_readme())
    elif command[0] == "run":
        run_notebooks("--save" in command, [word for word in command[1:] if word.isdigit()])
    elif command[0] == "exercises":
        for path, notebook in exercise_notebooks().items():
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    elif command[0] == "grade-all":
        grade_all()
    else:
        sys.exit(__doc__)
