"""Everything that is generated, by one command each. Run from the repository's top folder.

    python notebooks/make.py readme       fill the tables of README.md from notebooks/results/*.json
    python notebooks/make.py run          execute every notebook (SGU_QUICK=1: tiny sizes), fail on the first error
    python notebooks/make.py run --save   the same, and keep the outputs in the notebooks
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
        return f"<!-- number: {match[1]} {match[2]} {match[3]} -->{format(value, match[3])}<!-- end -->"

    text = (here.parent / "README.md").read_text()
    text = re.sub(r"<!-- results: (\S+) -->.*?<!-- end -->", block, text, flags=re.S)
    return re.sub(r"<!-- number: (\S+) (\S+) (\S+) -->.*?<!-- end -->", number, text, flags=re.S)


def run_notebooks(save):
    """Execute every notebook from a clean kernel, in the order of their names, in the folder it lies in."""
    import nbformat
    from nbclient import NotebookClient
    paths = sorted(here.glob("*.ipynb")) + sorted((here / "exercises").glob("*_solution.ipynb"))
    for path in paths:
        start, notebook = time.time(), nbformat.read(path, as_version=4)
        print(f"{path.relative_to(here.parent)} ...", end=" ", flush=True)
        NotebookClient(notebook, timeout=7200 if save else 900, resources={"metadata": {"path": str(path.parent)}}).execute()
        print(f"{time.time() - start:.0f} s", flush=True)
        if save:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)           # time stamps: nothing but noise in a diff
            nbformat.write(notebook, path)


if __name__ == "__main__":
    command = sys.argv[1:] or [""]
    if command[0] == "readme":
        (here.parent / "README.md").write_text(filled_readme())
    elif command[0] == "run":
        run_notebooks("--save" in command)
    else:
        sys.exit(__doc__)
