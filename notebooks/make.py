"""Everything that is generated, by one command each. Run from the repository's top folder.

    python notebooks/make.py readme         fill the tables of README.md from results/*.json
    python notebooks/make.py ship FOLDER    a finished run on MNIST -> what is quoted and shipped:
                                            results/mnist-3,7.json, mnist_*.pt, before_after.png
    python notebooks/make.py run            execute every notebook, fail on the first error
    python notebooks/make.py run --save     the same, and keep the outputs, and what 08 and 10
                                            write into results; run 02 05: only these
    python notebooks/make.py exercises      exercises/src/*.py -> exercises/*.ipynb, for students,
                                            and *_solution.ipynb
    python notebooks/make.py grade-all      solutions get full points, what students get none

SGU_QUICK=1 in the environment: notebooks at tiny sizes, to see that everything runs.
"""
import json, os, pathlib, re, sys, time

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))


def read_results(name):
    return json.loads((here / "results" / f"{name}.json").read_text(encoding="utf-8"))


ORDER = ("standard", "orthogonal", "obtuse", "relative", "unseen", "finetune")  # of all tables
PAPER = json.loads((here / "paper.json").read_text(encoding="utf-8"))           # its Tables 2 to 5


def paper_of(results, table=None):
    """(the paper's rows for the data set, schedule and forgotten classes, the number of its table).
    table: 2 or 5; None: 5 for fine-tuned models where it has the data set, else 2."""
    config = results["config"]
    name = results.get("data") or pathlib.Path(config["dataset"]).stem
    key = f"{name},{config['sde']}"
    if table is None:
        table = 5 if config["training"] == "finetune" and key in PAPER["5"] else 2
    rows = PAPER[str(table)].get(key, {})
    same = set(rows) - {"total", "D_g", "D_f"} == set(config["forget"].split(","))
    return rows if same else {}, table


def interval(share, ends):
    return f"{100 * share:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def cells_of(entry, forget, tasks):
    """The column of one method: {title of the row: text}, of what was measured; of tasks, too."""
    cells, ratio, nll = {}, entry.get("unlearning_ratio"), entry.get("nll_bits_per_dim")
    if ratio:
        cells = {f"{name}, %": f"{100 * ratio[name]:.1f}" for name in forget}
        cells["in all, % [95%]"] = interval(ratio["total"], ratio["ci95"])
    if entry.get("none") is not None:
        cells["none of these or unsure, %"] = f"{100 * entry['unsure']:.1f}"
        cells["none of these, %"] = f"{100 * entry['none']:.1f}"
    elif entry.get("unsure") is not None:                      # a judge without that class
        cells["judge unsure, %"] = f"{100 * entry['unsure']:.1f}"
    if entry.get("frechet_kept") is not None:
        cells["distance of kept samples"] = f"{entry['frechet_kept']:.2f}"
    if entry.get("frechet_real") is not None:
        cells["of as many real images"] = f"{entry['frechet_real']:.2f} (n = {entry['kept']})"
    for key in ("D_g", "D_f") if nll else ():
        error = f" ± {nll['se'][key]:.2f}" if nll["se"][key] is not None else ""
        open_ = "" if nll.get("converged", {}).get(key, True) else " (?)"
        cells[f"NLL {key}, bits/dim"] = f"{nll[key]:.2f}{error}{open_}"
    for task in [task for task in tasks if task in entry]:
        for key, found in entry[task].items():
            cells[f"{task} {key}, %"] = interval(found["accuracy"], found["ci95"])
            cells[f"{task} {key}, distance"] = f"{found['distance']:.2f}"
    return cells


def results_table(results, table=None, tasks=("inpaint", "reconstruct")):
    """A results file -> Markdown: its own table where it brings one, else a row per figure, a
    column per method, and under ours the paper's where it has the same."""
    if "markdown" in results:
        return results["markdown"].strip()
    import sgu
    methods, forget = results["methods"], results["config"]["forget"].split(",")
    shown = [m for m in ORDER if m in methods] + [m for m in methods if m not in ORDER]
    paper, number = paper_of(results, table)
    names = {f"{name}, %": name for name in forget} | {
        "in all, % [95%]": "total", "NLL D_g, bits/dim": "D_g", "NLL D_f, bits/dim": "D_f"}
    if len(forget) == 1:
        del names["in all, % [95%]"]                           # the paper's total says nothing new
    columns = {m: cells_of(methods[m], forget, tasks) for m in shown}
    rows = [["", *(sgu.METHODS[m].title if m in sgu.METHODS else m for m in shown)]]
    rows.append(["---"] + ["---:"] * len(shown))
    for title in dict.fromkeys(title for cells in columns.values() for title in cells):
        rows.append([title, *(columns[m].get(title, "") for m in shown)])
        if names.get(title) in paper:
            quote = dict(zip(PAPER["columns"], paper[names[title]]))
            digits = 2 if "NLL" in title else 1
            rows.append(["the paper's", *(f"{quote[m]:.{digits}f}" if m in quote else ""
                                          for m in shown)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n\n" + words_of(results, number if paper else None)


def words_of(results, number):
    """What a table's numbers are of; number: of the paper's table that is quoted, or None."""
    config, judge, methods = results["config"], results["judge"], results["methods"].values()
    words = f"`{results['command']}`; {results['device']}; seed {config['seed']}."
    ratios = [m["unlearning_ratio"] for m in methods if "unlearning_ratio" in m]
    if ratios:
        words += (f" n = {ratios[0]['n']} samples a method, 95% Wilson intervals; "
                  f"{config['sampler']}, {config['sampler_steps']} steps. Judge: test accuracy "
                  f"{100 * judge['test_accuracy']:.2f}%; it sees {100 * judge['floor']:.2f}% "
                  "forgotten classes in real images to keep (its floor). Distances: Fréchet's, of "
                  "its features.")
    nlls = [m["nll_bits_per_dim"] for m in methods if "nll_bits_per_dim" in m]
    if nlls:
        n = nlls[0]["n"]
        words += (f" NLL of {n['D_g']} and {n['D_f']} test images, ± one standard error; (?): the "
                  "integration did not converge.")
    words += f" {results['remark']}" if "remark" in results else ""     # written by hand
    return words + (f" The paper's: Table {number}. {PAPER['protocol']}" if number else "")


def filled_readme():
    """README.md with every block <!-- results: NAME --> ... <!-- end --> made anew from
    results/NAME.json, and every <!-- number: NAME KEY.KEY FORMAT -->."""
    def block(match):
        table = results_table(read_results(match[1]))
        return f"<!-- results: {match[1]} -->\n{table}\n<!-- end -->"

    def number(match):
        value = read_results(match[1])
        for key in match[2].split("."):
            value = value[key]
        text = f"{value / 60:.1f} min" if match[3] == "min" else format(value, match[3])
        return f"<!-- number: {match[1]} {match[2]} {match[3]} -->{text}<!-- end -->"

    text = (here.parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- results: (\S+) -->.*?<!-- end -->", block, text, flags=re.S)
    return re.sub(r"<!-- number: (\S+) (\S+) (\S+) -->.*?<!-- end -->", number, text, flags=re.S)


def ship(folder, columns=16, controls=4):
    """Copy the results, networks and judge of a finished run on MNIST to results/, and draw the
    picture of README: in its first columns Standard draws a clear 3 or 7, the last are controls."""
    import shutil
    import sgu
    folder, out = pathlib.Path(folder), here / "results"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config = results["config"]
    config["out"] = config["data_root"] = None                 # where files lay says nothing
    sgu.save_json(out / "mnist-3,7.json", results)
    names = [m for m in ORDER if m in results["methods"] and m != "finetune"]
    for name in ["judge", *names]:
        shutil.copy(folder / f"{name}.pt", out / f"mnist_{name}.pt")
    judge, forget = sgu.load_judge(out / "mnist_judge.pt"), [3, 7]
    images = {m: sgu.read_file(folder / f"samples_{m}.pt")["state"]["values"] for m in names}
    sure, shows = sgu.opinions(judge, images["standard"])[0].max(1)
    wanted = [i for i in range(len(sure)) if sure[i] > 0.9 and int(shows[i]) in forget]
    others = [i for i in range(len(sure)) if sure[i] > 0.9 and int(shows[i]) not in (*forget, 10)]
    chosen = wanted[:columns - controls] + others[:controls]
    rows = {sgu.METHODS[m].title: images[m][chosen] for m in names}
    sgu.draw_picture(out / "before_after.png", rows, judge, forget)


def run_notebooks(save, chosen=()):
    """Execute every notebook (or those whose numbers are chosen) from a clean kernel, in the order
    of their names, in the folder it lies in."""
    import nbformat
    from nbclient import NotebookClient
    os.environ["SGU_SAVE"] = str(int(save))                    # lets 08 and 10 write their results
    for path in sorted(here.glob("*.ipynb")):
        if chosen and path.name[:2] not in chosen:
            continue
        start, notebook = time.time(), nbformat.read(path, as_version=4)
        print(f"{path.relative_to(here.parent)} ...", end=" ", flush=True)
        NotebookClient(notebook, timeout=7200 if save else 900,
                       resources={"metadata": {"path": str(path.parent)}}).execute()
        print(f"{time.time() - start:.0f} s", flush=True)
        if save:
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)           # time stamps: only noise in a diff
            nbformat.write(notebook, path)


HEAD = (r" *(?P<kind>\[markdown\]|look|student|solution|check|) *(?P<question>\d+\.\d+)?"
        r"(?: \((?P<points>\d+) points?\))?(?: bug: (?P<words>.+))?(?P<only>solution)?")


def read_source(path):
    """A file of exercises/src -> its cells: dicts of kind (markdown, setup, look, student,
    solution, check), question, points, words, only, text.

    Each cell starts with a line # %% that says its kind; README.md of this folder lists them.
    words: what the check of an unmended bug must say. only: 'solution' for a markdown cell that
    students do not get.
    """
    cells = []
    for part in re.split(r"(?m)^# %%", pathlib.Path(path).read_text(encoding="utf-8"))[1:]:
        head, _, text = part.partition("\n")
        match = re.fullmatch(HEAD, head)
        asks = match and match["kind"] in ("student", "solution", "check")
        if (not match or asks != bool(match["question"])
                or (match["kind"] == "check") != bool(match["points"])):
            raise SystemExit(f"{path}: cannot read the line '# %%{head}'")
        cell = dict(match.groupdict(), kind=match["kind"].strip("[]") or "setup",
                    points=int(match["points"] or 0), text=text.strip("\n"))
        if cell["kind"] == "markdown":
            cell["text"] = re.sub(r"(?m)^# ?", "", cell["text"])
        cells.append(cell)
    return cells


def exercise_notebook(path, solution):
    """The notebook of a file of exercises/src as a dict: what students get, or the solution."""
    cells = []
    for i, cell in enumerate(read_source(path)):
        kind, q, text = cell["kind"], cell["question"], cell["text"]
        if kind == ("student" if solution else "solution") or (cell["only"] and not solution):
            continue
        name = "answer" if kind in ("student", "solution") else kind
        out = dict(id=f"{name}-{q.replace('.', '-') if q else i}",
                   metadata={"sgu": f"{name} {q}" if q else name})
        if kind == "markdown":
            out.update(cell_type="markdown", metadata={})
        else:
            out.update(cell_type="code", execution_count=None, outputs=[])
        if name == "answer":
            text = f"# question {q}: your answer\n{text}"
        if kind == "check":
            text = (f"# check of question {q}: run it, do not change it\n{text}\n"
                    f"print('{q}: {cell['points']} of {cell['points']} points')")
        cells.append(dict(out, source=text.splitlines(keepends=True)))
    kernel = dict(display_name="Python 3", language="python", name="python3")
    metadata = dict(kernelspec=kernel, language_info=dict(name="python"),
                    sgu=pathlib.Path(path).stem)
    return dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)


def exercise_notebooks():
    """{path of a notebook: its content} for every file of exercises/src."""
    folder = here / "exercises"
    return {folder / (source.stem + suffix + ".ipynb"): exercise_notebook(source, bool(suffix))
            for source in sorted((folder / "src").glob("*.py")) for suffix in ("", "_solution")}


def grade_all():
    """Grade all exercise notebooks; exit code 1 unless solutions get full points and what students
    get gets none."""
    sys.path.insert(0, str(here / "exercises"))
    import grade
    wrong = []
    for path in exercise_notebooks():
        start, (points, total) = time.time(), grade.grade(path, limit=300)
        print(f"   {time.time() - start:.0f} s", flush=True)
        if points != (total if path.stem.endswith("_solution") else 0):
            wrong.append(path.name)
    sys.exit(f"wrong points: {', '.join(wrong)}" if wrong else 0)


def main(command):
    if command[:1] == ["readme"]:
        (here.parent / "README.md").write_text(filled_readme(), encoding="utf-8")
    elif command[:1] == ["ship"] and len(command) == 2:
        ship(command[1])
    elif command[:1] == ["run"]:
        run_notebooks("--save" in command, [word for word in command if word.isdigit()])
    elif command[:1] == ["exercises"]:
        for path, notebook in exercise_notebooks().items():
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8")
    elif command[:1] == ["grade-all"]:
        grade_all()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
