"""The package as a whole: imports point down the story, the wheel works elsewhere, the shipped model is trained."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT

from prune_lab import __version__, dense_cache, job, out_of_memory
from prune_lab.config import command_line
from prune_lab.measure.perplexity import measure_losses, quality_of
from prune_lab.models.load import TINY, Tiny
from prune_lab.system.console import Console
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens

MODULES = sorted((ROOT / "prune_lab").rglob("*.py"))
# The story from its end to its beginning: what stands in a line knows those before it and its own, and nothing below.
LAYERS = (
    ("errors", "checks"),
    ("explain",),
    ("system",),
    ("fingerprint", "schedules"),
    ("cache",),
    ("results", "dense_cache"),
    ("text",),
    ("models",),
    ("export",),
    ("measure",),
    ("pruning",),
    ("methods", "post"),
    ("recovery",),
    ("job_context", "out_of_memory", "compare"),
    ("cleanup", "tracking"),
    ("config", "evaluator"),
    ("compatibility", "report"),
    ("compressing", "engine_beside", "estimate", "sweeps"),
    ("runner",),
    ("job", "commands"),
    ("api",),
    ("__init__", "__main__"),
)
LAYER = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "prune_lab").parts[0].removesuffix(".py")


def test_files_that_are_named_in_strings_exist() -> None:
    named = [*dense_cache.SOURCE, *out_of_memory._WORK]
    assert [name for name in named if not (ROOT / "prune_lab" / name).exists()] == []


def test_every_part_has_its_layer() -> None:
    assert {part_of(path) for path in MODULES} == set(LAYER)


def test_imports_point_down_the_story() -> None:
    """Also those inside functions, and those for types alone."""
    climbs = []
    for path in MODULES:
        known = {name.split(".")[1] for name in imports(path) if name.startswith("prune_lab.")} & set(LAYER)
        mine = part_of(path)
        climbs += [f"{path}: {name}" for name in known if LAYER[name] >= LAYER[mine] and name != mine]
    assert climbs == []


def test_what_is_measured_and_pruned_does_not_know_of_hydra() -> None:
    for path in MODULES:
        if LAYER[part_of(path)] < LAYER["tracking"] and part_of(path) != "explain":
            assert not any(name.split(".")[0] in ("hydra", "omegaconf", "mlflow") for name in imports(path)), path


def users_of(library: str) -> set[str]:
    """The modules that import a library, anywhere in them."""
    return {
        path.relative_to(ROOT / "prune_lab").as_posix()
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports(path))
    }


def test_omegaconf_stops_at_the_door() -> None:
    assert users_of("omegaconf") == {
        "__main__.py", "explain.py", "config/composing.py", "config/in_python.py", "config/overrides.py",
        "config/parts.py", "config/recipe_files.py", "sweeps/remote.py", "sweeps/sweep.py",
    }  # fmt: skip


def test_mlflow_is_known_to_tracking_alone() -> None:
    """To connect to a store, write to it and read from it."""
    assert users_of("mlflow") == {
        "tracking/connection.py", "tracking/mlflow_log.py", "tracking/mlflow_store.py",
    }  # fmt: skip


def test_no_module_imports_itself_in_a_circle() -> None:
    """By what is imported while a module loads and what it imports for types alone, not inside functions."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
    graph = {}
    for path, name in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
        known = [node for node in [*tree.body, *for_types] if isinstance(node, ast.ImportFrom) and node.module]
        wanted = {node.module for node in known} | {f"{n.module}.{a.name}" for n in known for a in n.names}
        graph[name] = wanted & set(names.values()) - {name, "prune_lab"}

    def reach(start: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        for following in graph[start] - seen:
            seen = reach(following, seen | {following})
        return seen

    for name in graph:
        assert name not in reach(name), name


def test_every_module_and_public_name_says_what_it_is() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path.name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                inner = any(node in outer.body for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef))
                assert inner or ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_package_names_the_extras_that_there_are() -> None:
    """Where a library is missing it says which extra has it; of sentencepiece it names the packages themselves."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [path.read_text(encoding="utf-8") for path in [*MODULES, ROOT / "README.md"]]
    named = {name for text in texts for name in re.findall(r"prune-lab\[([a-z-]+)\]", text)}
    named |= {*job._EXTRAS.values(), *command_line._EXTRAS.values()}
    assert named == set(extras) - {"test", "sentencepiece"}


# The shipped model.


def test_the_shipped_model_is_small_and_safe() -> None:
    assert sum(path.stat().st_size for path in TINY.glob("*.safetensors")) <= 8e6
    assert {path.suffix for path in TINY.iterdir()} == {".json", ".safetensors"}


def test_the_shipped_model_is_a_grouped_query_llama_with_its_own_tokenizer() -> None:
    loaded = Tiny().load(CPU, seed=0)
    config = loaded.model.config
    assert (loaded.name, loaded.family) == ("tiny", "llama")
    assert config.num_key_value_heads < config.num_attention_heads
    assert len(loaded.tokenizer) == config.vocab_size
    text = "def f(x):\n    return x ** 2  # naïve\n"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


def test_the_shipped_model_is_trained() -> None:
    """On text it never saw; a model that guesses needs about 3.5 bits. Other Pythons have slightly other text."""
    loaded = Tiny().load(CPU, seed=0)
    tokens = Tokens(Stdlib().corpus(), loaded.tokenizer)
    windows = tokens.windows("test", 256)[:40]
    losses = measure_losses(loaded.model, windows, 8, CPU, Console(quiet=True))
    quality = quality_of(losses, tokens.bytes_per_token("test"))
    assert 0.8 < quality.bits_per_byte < 1.6
    prompt = loaded.tokenizer("import os\n\n\ndef main(", return_tensors="pt")["input_ids"]
    written = loaded.model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert ")" in loaded.tokenizer.decode(written[0, prompt.shape[1] :])
    assert torch.isfinite(loaded.model(input_ids=prompt).logits).all()


# The wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package built as a wheel, with the build backend that is installed for the tests."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_runs_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the wheel and, from this one, what it depends on; the checkout is out of sight."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip())
    packages = [path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")]
    # A .pth file of an editable install is not read from folders named in another .pth: the checkout stays hidden.
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in packages))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": ""}
    arguments = ["amount=0.3", "measure=quality_only", "measure.max_windows=4", "hydra.run.dir=here"]
    done = subprocess.run(
        [python, "-m", "prune_lab", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert (summary["status"], summary["environment"]["prune_lab"]) == ("FINISHED", __version__)
    assert summary["metrics"]["amount/realized"] == pytest.approx(0.3, abs=1e-5)
    where = subprocess.run(
        [python, "-c", "import prune_lab; print(prune_lab.__file__)"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(site) in where.stdout


def test_docstrings_begin_with_a_noun() -> None:
    """Not with a riddle that names a thing by its role: "What ... goes by"."""
    riddles = re.compile(r"(What|Whether|Where|Who|Why|How|Which|That|Those|They|As|It) ")
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if riddles.match(text := ast.get_docstring(node) or "")
    ]
    assert found == []
