"""Everything that is generated, by one command each. Run from the repository's top folder.

    python notebooks/make.py fill           write what results/*.json say into README.md,
                                            results/README.md and the text of the notebooks
    python notebooks/make.py stale          list the results that today's code would not make; exit
                                            code 1 if one of those pages quotes such a file
    python notebooks/make.py table OUT      the table of a finished run, with the paper's rows
    python notebooks/make.py pairs OUT      add to OUT/results.json the paired differences of every
                                            method to Unseen and Standard, with 95% intervals
    python notebooks/make.py ship FOLDER    a finished run on MNIST -> what is quoted and shipped:
                                            results/mnist-3,7.json, mnist_*.pt, before_after.png
    python notebooks/make.py run            execute every notebook, fail on the first error; with
                                            SGU_QUICK=1 in the environment at tiny sizes
    python notebooks/make.py run --save     the same, and keep the outputs; run 02 05: only these
    python notebooks/make.py exercises      exercises/src/*.py -> *.ipynb and *_solution.ipynb
    python notebooks/make.py grade-all      solutions get full points, what students get none

fill writes between such a comment and the <!-- end --> that must follow it:

    <!-- results: NAME [brief] -->       the table of results/NAME.json, and what it is of
    <!-- rows: SECTION NAME NAME -->     the same rows of several files in one table. SECTION:
                                         ratio, nll, inpaint, reconstruct, inpaint-distance or
                                         reconstruct-distance. NAME cifar10,vp: the paper's rows
    <!-- seeds: NAME NAME NAME -->       mean ± standard deviation over files of several seeds
    <!-- number: NAME PATH FORMAT -->    PATH: methods.obtuse.unlearning_ratio.ci95.0, say. FORMAT:
                                         of Python, as .1% or .2f, or min for seconds as minutes.
                                         NAME paper: of paper.json
    <!-- code: MODULE.NAME ... -->       needs no end: see kit.with_code
"""
import json, math, pathlib, re, sys, textwrap, time

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))


def read_results(name):
    path = here / ("paper.json" if name == "paper" else f"results/{name}.json")
    return json.loads(path.read_text(encoding="utf-8"))


# ==== 1. Tables of results, the paper's numbers under ours ========================================

ORDER = ("standard", "orthogonal", "obtuse", "relative", "unseen", "finetune")  # of all tables
PAPER = read_results("paper")                                                   # its Tables 1 to 5
DATA = dict(mnist="MNIST", cifar10="CIFAR-10", stl10="STL-10", celeba="CelebA")
TASKS, PARTS = dict(inpaint="3", reconstruct="4"), ("D_g", "D_f")   # the paper's table of a task
SECTIONS = dict(ratio=["in all, % [95%]"], nll=[f"NLL {part}, bits/dim" for part in PARTS])
for task in TASKS:
    SECTIONS[task] = [f"{task} {part}, %" for part in PARTS]
    SECTIONS[f"{task}-distance"] = [f"{task} {part}, distance" for part in PARTS]


def key_of(results):
    """The data set and the schedule, as paper.json names them."""
    config = results["config"]
    return f"{results.get('data') or pathlib.Path(config['dataset']).stem},{config['sde']}"


def paper_of(results, table=None):
    """(key_of(results), or None if the paper did not forget the same; its table of ratios, 2 or 5;
    if that is None, 5 for fine-tuned models where it has the data set, else 2)."""
    config, key = results["config"], key_of(results)
    table = table or (5 if config["training"] == "finetune" and key in PAPER["5"] else 2)
    classes = set(PAPER[str(table)].get(key, {})) - {"total", *PARTS}
    return key if classes == set(config["forget"].split(",")) else None, str(table)


def interval(share, ends):
    return f"{100 * share:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def cells_of(entry, forget, tasks):
    """The column of one method: {title of the row: text}, of what was measured; of tasks, too."""
    cells, ratio, nll = {}, entry.get("unlearning_ratio"), entry.get("nll_bits_per_dim")
    if ratio:
        if len(forget) > 1:
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
    for key in PARTS if nll else ():
        error = f" ± {nll['se'][key]:.2f}" if nll["se"][key] is not None else ""
        open_ = "" if nll.get("converged", {}).get(key, True) else " (?)"
        cells[f"NLL {key}, bits/dim"] = f"{nll[key]:.2f}{error}{open_}"
    for task in [task for task in tasks if task in entry]:
        for key, found in entry[task].items():
            cells[f"{task} {key}, %"] = interval(found["accuracy"], found["ci95"])
            cells[f"{task} {key}, distance"] = f"{found['distance']:.2f}"
    return cells


def columns_of(results, tasks=tuple(TASKS)):
    forget = results["config"]["forget"].split(",")
    return {m: cells_of(entry, forget, tasks) for m, entry in results["methods"].items()}


def rows_of(title, columns, paper, label):
    """Our row of a table and the paper's below it, as far as there are any: [(label, {method:
    text}, number of the paper's table or None)]. paper: what paper_of returns."""
    (key, number), row, digits = paper, title.removesuffix(", %"), 1 if "%" in title else 2
    task, part = title.split()[0], next((part for part in PARTS if part in title), None)
    if task in TASKS:
        number, row = TASKS[task], part if "%" in title else f"distance {part}"
    elif part or title in SECTIONS["ratio"]:
        row = part or "total"
    values = PAPER[number].get(key, {}).get(row, ())
    theirs = {m: f"{v:.{digits}f}" for m, v in zip(PAPER["columns"], values)}
    ours = {m: cells[title] for m, cells in columns.items() if title in cells}
    rows = [(label, ours, None)] if ours else []
    if theirs:
        rows.append(("the paper's" if ours else f"{label}, the paper's", theirs, number))
    return rows


def table_text(head, rows, words=1):
    """A table in Markdown: the titles of its columns, and rows of cells; so many are words."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def markdown(rows, methods):
    """Rows of a table in Markdown, a column per method."""
    import sgu
    shown = [m for m in ORDER if m in methods] + [m for m in methods if m not in ORDER]
    head = ["", *(sgu.METHODS[m].title if m in sgu.METHODS else m for m in shown)]
    return table_text(head, [[label, *(cells.get(m, "") for m in shown)]
                             for label, cells, _ in rows])


def results_table(results, table=None, tasks=tuple(TASKS), brief=False):
    """A results file -> Markdown: its own table where it brings one, else a row per figure, a
    column per method, and under ours the paper's where it has the same. brief: eight rows of ours
    for README, which leaves out the share of none alone."""
    if "markdown" in results:
        table, made = results["markdown"].strip(), results["command"]
        return table if made in table else f"{table}\n\n`{made}`; {results['device']}."
    columns, rows = columns_of(results, tasks), []
    for title in dict.fromkeys(title for cells in columns.values() for title in cells):
        if not (brief and title == "none of these, %"):
            rows += rows_of(title, columns, paper_of(results, table), title)
    words = f"{words_of(results, ('ratio', 'nll', *tasks))} {words_of_paper(rows)}"
    return f"{markdown(rows, columns)}\n\n{words.strip()}"


def rows_table(section, *names):
    """One table of a section's rows over several results files; see the top of this file."""
    rows, words = [], []
    for name in names:
        key, paper, columns, how = name, (name, "2"), {}, ""   # of the paper alone
        if not any(name in PAPER[number] for number in "2345"):
            results = read_results(name)
            key, paper, columns = key_of(results), paper_of(results), columns_of(results)
            how = ", re-trained" if results["config"]["training"] == "retrain" else ""
        data, sde = key.split(",")
        label = f"{DATA.get(data, data)}, {sde.upper()}{how}"
        for title in SECTIONS[section]:
            part = "".join(f", {part}" for part in PARTS if part in title)
            rows += rows_of(title, columns, paper, label + part)
        if not any(row.startswith(label) for row, *_ in rows):
            raise KeyError(f"{name} has no {section}")
        if columns:
            words.append(f"{label}: {words_of(results, [section.partition('-')[0]])}")
    methods = dict.fromkeys(m for _, cells, _ in rows for m in cells)
    return "\n\n".join([markdown(rows, methods), *words, words_of_paper(rows)]).strip()


def seeds_table(*names):
    """Mean ± standard deviation of every method over files that differ in their seed alone."""
    import numpy as np
    figures = {"in all, %": ("unlearning_ratio.total", 100, ".1f"),
               "none of these or unsure, %": ("unsure", 100, ".1f"),
               "distance of kept samples": ("frechet_kept", 1, ".2f"),
               **{f"NLL {part}, bits/dim": (f"nll_bits_per_dim.{part}", 1, ".2f")
                  for part in PARTS}}
    files, rows = [read_results(name) for name in names], []
    for key, value in files[0]["config"].items():
        same = all(file["config"][key] == value for file in files)
        if key not in ("seed", "methods", "out", "data_root") and not same:
            raise ValueError(f"{', '.join(names)} differ in {key}")
    methods = [m for m in files[0]["methods"] if all(m in file["methods"] for file in files)]
    for title, (path, unit, form) in figures.items():
        cells = {}
        for m in methods:
            values = [unit * look_up(file["methods"][m], path) for file in files]
            cells[m] = f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"
        rows.append((title, cells, None))
    n = files[0]["methods"][methods[0]]["unlearning_ratio"]["n"]
    seeds = ", ".join(str(file["config"]["seed"]) for file in files)
    return (f"{markdown(rows, methods)}\n\n`{files[-1]['command']}`; "
            f"{files[0]['device']}; mean ± standard deviation over seeds {seeds}, n = {n} samples "
            "each.")


def words_of(results, sections):
    """What the numbers of a table are of."""
    config, judge = results["config"], results["judge"]
    words = [f"`{results['command']}`; {results['device']}; seed {config['seed']}."]
    one = {key: m[key] for m in results["methods"].values() for key in m}  # n is the same in all
    ratio, nll = one.get("unlearning_ratio"), one.get("nll_bits_per_dim")
    if ratio and "ratio" in sections:
        words.append(
            f"n = {ratio['n']} samples a method, 95% Wilson intervals; {config['sampler']}, "
            f"{config['sampler_steps']} steps. Judge: test accuracy {judge['test_accuracy']:.2%}; "
            f"it sees {judge['floor']:.2%} forgotten classes in real images to keep (its floor). "
            "Distances: Fréchet's, of its features.")
    if nll and "nll" in sections:
        words.append(f"NLL of {nll['n']['D_g']} and {nll['n']['D_f']} test images, ± one standard "
                     "error.")
        found = [m.get("nll_bits_per_dim", {}) for m in results["methods"].values()]
        if not all(done for entry in found for done in entry.get("converged", {}).values()):
            words.append("(?): the integration did not converge.")
    for task in [task for task in TASKS if task in sections and task in one]:
        n = " and ".join(str(part["n"]) for part in one[task].values())
        clean = " and ".join(f"{part['clean']:.1%}" for part in one[task].values())
        words.append(f"{task.title()}: {n} test images of D_g and D_f, of which the judge names "
                     f"{clean} correctly when untouched; distances of its features before and "
                     "after.")
    return " ".join([*words, results.get("remark", "")]).strip()        # a remark is ours, by hand


def words_of_paper(rows):
    """What the paper's numbers in a table are of, if there are any."""
    numbers = sorted({number for _, _, number in rows if number})
    words = [f"The paper's: Table{'s' * (len(numbers) > 1)} {' and '.join(numbers)}."]
    words += [PAPER["protocol"]] * bool({"2", "5"} & {*numbers})
    words += [PAPER["tasks"]] * bool({"3", "4"} & {*numbers})
    return " ".join(words) if numbers else ""


# ==== 2. Pages filled from results ================================================================

# What fill writes into, and where stale looks for quotations.
PAGES = [here.parent / "README.md", here / "results/README.md", *sorted(here.glob("*.ipynb"))]


def look_up(content, path):
    """What stands at a path such as runs.0.ci95.1; of keys that hold dots, the longest fits. An
    entry of a list is named by its number, or by what it alone says: rows.unseen/em/120."""
    if not path:
        return content
    words = path.split(".")
    known = content if isinstance(content, dict) else {}
    if isinstance(content, list):
        said = {*words[0].split("/")}
        found = [v for v in content if isinstance(v, dict) and said <= {*map(str, v.values())}]
        known = {words[0]: found[0]} if len(found) == 1 else {}
        known |= {str(i): v for i, v in enumerate(content)}    # a number is a place, not a value
    for i in range(len(words), 0, -1):
        key = ".".join(words[:i])
        if key in known:
            return look_up(known[key], ".".join(words[i:]))
    raise KeyError(f"no {path} among {', '.join(known)}")


def content_of(kind, words):
    """What belongs between a comment and its end."""
    if kind == "number":
        name, *path, form = words
        value = look_up(read_results(name), " ".join(path))
        return f"{value / 60:.1f} min" if form == "min" else format(value, form)
    if kind == "results":
        name, *brief = words
        if brief not in ([], ["brief"]):
            raise ValueError("a results file, and brief or nothing")
        return f"\n{results_table(read_results(name), brief=bool(brief))}\n"
    return f"\n{dict(rows=rows_table, seeds=seeds_table)[kind](*words)}\n"


def filled(text, where, problems):
    """A page's text with what its comments ask for. What cannot be filled stays, and problems gets
    a line that begins with where."""
    def fresh(match):
        try:
            return f"{match[1]}{content_of(match[2], match[3].split())}<!-- end -->"
        except (KeyError, ValueError, TypeError, OSError) as error:
            problems.append(f"{where}: {match[1]}: {type(error).__name__} {error}")
            return match[0]

    start = "<!-- (results|rows|seeds|number):"
    block = rf"({start}([^>]*)-->)(?:(?!{start}).)*?<!-- end -->"
    text, n = re.subn(block, fresh, text, flags=re.S)
    if not n == len(re.findall(start, text)) == text.count("<!-- end -->"):
        problems.append(f"{where}: a comment of make.py without its end, or an end without one")
    return text


def filled_page(path, problems):
    """The new content of a page; of a notebook nothing but the Markdown is touched."""
    text = path.read_bytes().decode()
    if path.suffix != ".ipynb":
        return filled(text, path.name, problems)
    notebook = json.loads(text)
    plain = notebook_text(notebook)
    for cell in [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]:
        old = "".join(cell["source"])
        new = filled(old, path.name, problems)
        if "<!-- code:" in new:
            import kit
            new = kit.with_code(new)
        if new != old:
            cell["source"] = new.splitlines(keepends=True)
    new = notebook_text(notebook)
    if new != plain != text:                                   # more than the text would change
        problems.append(f"{path.name} is not as Jupyter writes it: save it there first")
    return new if new != plain == text else text


def fill():
    """Rewrite the pages that change. Exit code 1 and a line each for what cannot be filled."""
    problems = []
    for path in PAGES:
        new = filled_page(path, problems).encode()
        if new != path.read_bytes():
            path.write_bytes(new)
            print(f"filled {path.relative_to(here.parent)}")
    sys.exit("\n".join(problems) or 0)


# ==== 3. Runs, notebooks, exercises ===============================================================

def results_of(folder):
    return json.loads((pathlib.Path(folder) / "results.json").read_text(encoding="utf-8"))


def paired(a, b):
    """a - b on the same n samples, (n,) each: its mean and 95% interval (normal; n = 1: None)."""
    d = a.double() - b.double()
    mean, spread = float(d.mean()), float(d.std(correction=min(1, len(d) - 1)))
    half = 1.959964 * spread / math.sqrt(len(d))
    return dict(mean=mean, ci95=[mean - half, mean + half] if len(d) > 1 else None)


def pairs(folder):
    """Add the entries minus unseen and minus standard to a run's results.json, of the ratio and of
    the bits/dim: all methods start from the same noise and see the same test images, so that a
    difference is known better than its two terms. What is compared stands in the run's files."""
    import torch
    import sgu
    folder, results = pathlib.Path(folder), results_of(folder)
    methods, config, measured = results["methods"], results["config"], {}
    sampled = any("unlearning_ratio" in entry for entry in methods.values())
    device = config["device"] if torch.cuda.is_available() else "cpu"
    judge = sgu.load_judge(folder / "judge.pt", device) if sampled else None

    def values(task, method, n):
        return sgu.read_file(folder / f"{task}_{method}.pt")["state"]["values"][:n]

    for m, entry in methods.items():
        found = measured[m] = {}
        if "unlearning_ratio" in entry:
            classes = list(entry["class_histogram"])
            forget = torch.tensor([classes.index(name) for name in config["forget"].split(",")])
            images = values("samples", m, entry["unlearning_ratio"]["n"])
            found["ratio"] = torch.isin(sgu.opinions(judge, images)[0].argmax(1), forget)
        nll = entry.get("nll_bits_per_dim")
        for part in PARTS if nll else ():
            found[part] = values(f"likelihood_{part}_{nll['steps'][part]}", m, nll["n"][part])
    for other in [m for m in ("unseen", "standard") if m in methods]:
        for m in [m for m in methods if m != other]:
            methods[m][f"minus {other}"] = {
                key: paired(v, measured[other][key]) for key, v in measured[m].items()}
    sgu.save_json(folder / "results.json", results)


def ship(folder, columns=16, controls=4):
    """Copy the results, networks and judge of a finished run on MNIST to results/, and draw the
    picture of README: in its first columns Standard draws a clear 3 or 7, the last are controls."""
    import shutil
    import sgu
    pairs(folder)                                              # the notebooks quote them
    folder, out, results = pathlib.Path(folder), here / "results", results_of(folder)
    results["config"].update(out=None, data_root=None)         # where files lay says nothing
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
    """Execute every notebook, or those of the chosen numbers, in order, from a clean kernel."""
    import nbformat
    import stale
    from nbclient import NotebookClient
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
            stale.sign(path, start)


def notebook_text(notebook):
    """A notebook as Jupyter writes it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


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
        if kind == "check":                                    # a line of words, never a traceback
            text += f"\nprint('{q}: {cell['points']} of {cell['points']} points')"
            head = f"# check of question {q}: run it, do not change it\n"
            head += f"with marking.marked('{q}', {cell['points']}):\n"
            text = head + textwrap.indent(text, "    ")
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
    """Exit code 1 unless solutions get full points, and what students get gets none."""
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
    if command == ["fill"]:
        fill()
    elif command == ["stale"]:
        import stale
        sys.exit(stale.main())
    elif command[:1] == ["table"] and len(command) == 2:
        print(results_table(results_of(command[1])))
    elif command[:1] == ["pairs"] and len(command) == 2:
        pairs(command[1])
    elif command[:1] == ["ship"] and len(command) == 2:
        ship(command[1])
    elif command[:1] == ["run"]:
        run_notebooks("--save" in command, [word for word in command if word.isdigit()])
    elif command[:1] == ["exercises"]:
        for path, notebook in exercise_notebooks().items():
            path.write_text(notebook_text(notebook), encoding="utf-8")
    elif command[:1] == ["grade-all"]:
        grade_all()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
