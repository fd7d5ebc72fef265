"""Configuration: every option is its dataclass, only ours is built, and a recipe is data, never a program."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from conftest import ROOT, Cli
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from prune_lab.config import parts as config
from prune_lab.config import recipes
from prune_lab.errors import Refused
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.methods.weights import WeightMethod
from prune_lab.recovery.base import Recovery
from prune_lab.results.summary import flatten
from prune_lab.text.stdlib import Stdlib

OPTIONS = sorted(path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").glob("*/*.yaml"))
RECIPES = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
# Keys without which an option cannot be built.
REQUIRED = {"model/hf": "model.name", "dataset/text": "dataset.path"}
# Options of another option's class, and the keys in which they differ from it.
PRESETS = {
    "method/structured": {"score", "refit"}, "method/taylor": {"score"}, "method/wifv": {"score", "refit"},
    "method/unstructured": {"score", "scope", "refit"},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def schema() -> None:
    config.register_schema()


def composed(*overrides: str) -> DictConfig:
    """The configuration of a command line."""
    return copy.deepcopy(composed_once(*overrides))


@functools.cache
def composed_once(*overrides: str) -> DictConfig:
    with initialize_config_dir(config.CONF_DIR, version_base="1.3"):
        return compose("config", overrides=list(overrides))


def class_of(target: str) -> type:
    """The class that a `_target_` names, found without prune_lab.config."""
    module, _, name = target.rpartition(".")
    found: type = getattr(__import__(module, fromlist=[name]), name)
    return found


def read(option: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "conf" / option).read_text(encoding="utf-8"))
    return found


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_the_groups_are_those_of_the_folders() -> None:
    assert {option.split("/")[0] for option in OPTIONS} == set(config.GROUPS)
    assert {str(key) for key in composed()} == {f.name for f in dataclasses.fields(config.Settings)} | set(
        config.GROUPS
    )


def test_an_option_is_its_dataclass(folder: Path) -> None:
    """Keys are fields; values are the fields' defaults, unless required, interpolated or those of a preset."""
    for option in OPTIONS:
        check_dataclass(option, folder)


def check_dataclass(option: str, folder: Path) -> None:
    group, name = option.removesuffix(".yaml").split("/")
    node = composed(f"{group}={name}")[group]
    cls = class_of(node["_target_"])
    assert dataclasses.is_dataclass(cls), option
    assert cls.__dataclass_params__.frozen, option
    fields = {f.name: f for f in dataclasses.fields(cls)}
    assert {str(key) for key in node} - {"_target_"} == set(fields), option

    raw = read(option)
    if "defaults" in raw:
        return  # a preset of another option: other values are its purpose
    differ = set()
    default = dataclasses.asdict(cls(**{REQUIRED[f"{group}/{name}"].split(".")[1]: str(folder)})
                                 if f"{group}/{name}" in REQUIRED else cls())  # fmt: skip
    expected = dict(leaves(default))
    for key, value in leaves({key: value for key, value in raw.items() if key != "_target_"}):
        if value == "???":
            assert f"{group}.{key}" == REQUIRED[f"{group}/{name}"]
        elif not (isinstance(value, str) and value.startswith("${")):
            wanted = expected[key]
            if value != (list(wanted) if isinstance(wanted, tuple) else wanted):
                differ.add(key)
            assert isinstance(value, bool) == isinstance(wanted, bool), (option, key)
    assert differ == PRESETS.get(f"{group}/{name}", set()), option


def test_an_option_begins_with_what_it_is() -> None:
    for option in OPTIONS:
        first = (ROOT / "conf" / option).read_text(encoding="utf-8").splitlines()[0]
        assert re.match(r"# [A-Z]\S*( \S+)+[.:]?$", first), f"{option}: {first}"


def test_an_option_is_built_as_its_class(folder: Path) -> None:
    for option in OPTIONS:
        group, name = option.removesuffix(".yaml").split("/")
        required = REQUIRED.get(f"{group}/{name}")
        extra = [f"{required}={folder}"] if required else []
        node = composed(f"{group}={name}", *extra)[group]
        built = config.build(node, group)
        assert type(built) is class_of(node["_target_"]), option
        again = config.build(composed(f"{group}={name}", *extra)[group], group)
        assert built == again, option
        assert hash(built) == hash(again), option
        with pytest.raises(dataclasses.FrozenInstanceError):
            built.anything = 1


def test_what_can_be_refused_is_known_without_torch() -> None:
    """In a fresh process: after the class of every option, and what a job checks them with, PyTorch is not there."""
    targets = sorted({target for option in OPTIONS if (target := read(option).get("_target_"))})
    assert len(targets) > 30
    program = (
        "import importlib, sys\n"
        "for target in ['prune_lab.job.run', 'prune_lab.compatibility.check_parts', *sys.argv[1:]]:\n"
        "    module, _, name = target.rpartition('.')\n"
        "    getattr(importlib.import_module(module), name)\n"
        "    assert 'torch' not in sys.modules, target\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *targets], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_root_keys_are_the_settings() -> None:
    cfg = composed()
    for field in dataclasses.fields(config.Settings):
        assert cfg[field.name] == field.default
        kind = get_type_hints(config.Settings)[field.name]
        assert type(config.plain(cfg)[field.name]) is (list if kind in (tuple[str, ...], Any) else kind)


def test_amount_and_window_length_reach_the_parts() -> None:
    parts = config.build_parts(composed("model.weights=random", "amount=0.25", "dataset.seq_len=64"))
    assert parts.settings.amount == parts.method.amount == 0.25
    assert parts.dataset.seq_len == parts.dataset.calibration.seq_len == 64
    parts = config.build_parts(composed("model.weights=random", "dataset.calibration.seq_len=32"))
    assert (parts.dataset.seq_len, parts.dataset.calibration.seq_len) == (256, 32)


def test_options_that_are_swept_against_each_other_share_keys() -> None:
    names = {group: [o.split("/")[1][:-5] for o in OPTIONS if o.startswith(f"{group}/")] for group in config.GROUPS}
    assert {"none", "finetune"} <= set(names["recovery"])
    for name in names["recovery"]:
        node = composed(f"recovery={name}", "recovery.steps=7", "recovery.lr=0.01", "recovery.batch_size=2").recovery
        built = config.build(node, "recovery")
        assert isinstance(built, Recovery)
        assert (built.steps, built.lr, built.batch_size) == (7, 0.01, 2)
    assert {"none", "int8_dynamic", "int4_weight_only"} <= set(names["post"])
    for name in names["post"]:
        assert config.build(composed(f"post={name}", "post.group_size=64").post, "post").group_size == 64
    weight_methods = [
        n for n in names["method"] if issubclass(class_of(read(f"method/{n}.yaml")["_target_"]), WeightMethod)
    ]
    assert {"magnitude", "none", "random", "ria", "sparsegpt", "unstructured", "wanda"} <= set(weight_methods)
    for name in weight_methods:
        scope = "window" if name == "sparsegpt" else "global"  # its only one
        overrides = "method.pattern=2:4", f"method.scope={scope}", "method.allocation=uniform"
        built = config.build(composed(f"method={name}", *overrides).method, "method")
        assert (built.pattern, built.scope, built.allocation) == ("2:4", scope, "uniform")
        built = config.build(composed(f"method={name}", "method.allocation=owl").method, "method")
        assert (built.pattern, built.allocation) == (None, "owl")


FOREIGN = [
    "os.system", "os", "subprocess.Popen", "builtins.eval", "torch.nn.Linear", "hydra.utils.call",
    "prune_labx.evil.Thing",
    "prune_lab.runner.shutil.rmtree", "prune_lab.config.parts.os.system",
    "prune_lab.config.parts.importlib.import_module", "prune_lab.config.parts.DictConfig",
    "prune_lab.config.parts.dataclass", "prune_lab.config.parts.build", "prune_lab.errors.Refused",
    "prune_lab.system.console.Console", "prune_lab.text.tokens.Tokens", "prune_lab", "prune_lab.", "prune_lab.config",
    "prune_lab..config.Settings", "prune_lab.nothing.Thing", "prune_lab.methods.magnitude.Nothing", "", ".", 5, None,
    {"_target_": "os.system"}, ["os.system"],
]  # fmt: skip


def test_only_dataclasses_of_the_package_are_built() -> None:
    for target in FOREIGN:
        node = OmegaConf.create({"_target_": target, "command": "true"})
        with pytest.raises(Refused, match=r"^method\._target_=.*allowed are the dataclasses of prune_lab") as refused:
            config.build(node, "method")
        assert len(str(refused.value)) < 250, target


def test_a_node_without_a_target_is_refused() -> None:
    for node in (OmegaConf.create({"amount": 0.5}), OmegaConf.create({})):
        with pytest.raises(Refused, match=r"^method\._target_"):
            config.build(node, "method")
    with pytest.raises(Refused, match="not an option of the group method"):
        config.build("magnitude", "method")


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("method", "prune_lab.config.parts.Settings"),
        ("method", "prune_lab.text.stdlib.Stdlib"),
        ("recovery", "prune_lab.methods.magnitude.Magnitude"),
        ("recovery", "prune_lab.recovery.context.Training"),
        ("tracking", "prune_lab.job_context.JobContext"),
    ],
)
def test_a_dataclass_of_another_kind_is_no_option_of_the_group(group: str, target: str) -> None:
    """It would fail only in the middle of the run."""
    cfg = composed("model.weights=random")
    cfg[group] = {"_target_": target}
    with pytest.raises(Refused, match=rf"^{group}\._target_="):
        config.build_parts(cfg)


def test_a_foreign_target_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "imported"
    body = f"from dataclasses import dataclass\nopen({str(marker)!r}, 'w').close()\n@dataclass\nclass Thing: pass\n"
    for name in ("evil", "prune_lab_evil", "method"):
        (tmp_path / f"{name}.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(Refused, match="is not allowed"):
            config.build(OmegaConf.create({"_target_": f"{name}.Thing"}), "method")
        assert not marker.exists()
        assert name not in sys.modules
    __import__("evil")
    assert marker.exists()  # the marker works


def test_other_packages_are_let_in_by_the_environment_alone(tmp_path: Path) -> None:
    """PRUNE_LAB_ALLOW is read at import; set later, by a recipe's env_set, it has no effect."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/parts.py").write_text(
        "from dataclasses import dataclass\nfrom other import Foreign\nfrom prune_lab.schedules import Schedule\n"
        "@dataclass(frozen=True)\nclass Mine(Schedule):\n    size: int = 3\n    def __post_init__(self):\n"
        "        if self.size > 9: raise ValueError(f'size={self.size} is above 9')\n"
    )
    (tmp_path / "other.py").write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Foreign:\n    size: int = 3\n"
    )
    program = (
        "import os, sys\nfrom omegaconf import OmegaConf\nfrom prune_lab.config.parts import build\n"
        "os.environ['PRUNE_LAB_ALLOW'] = 'mine,other,os'\n"
        "try:\n    print(build(OmegaConf.create({'_target_': sys.argv[1], 'size': sys.argv[2]}), 'schedule'))\n"
        "except ValueError as error:\n    print(type(error).__name__, error)\n"
    )

    def answer(allow: str | None, target: str, size: str = "5") -> str:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
        env.pop("PRUNE_LAB_ALLOW", None)
        if allow is not None:
            env["PRUNE_LAB_ALLOW"] = allow
        command = [sys.executable, "-c", program, target, size]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    assert answer("mine", "mine.parts.Mine") == "Mine(start=0.0, size=5)"
    assert answer("a,mine,", "mine.parts.Mine", "12") == "Refused schedule.size=12 is above 9"
    assert answer(None, "mine.parts.Mine").startswith("Refused schedule._target_='mine.parts.Mine' is not allowed")
    assert answer("mine", "mine.parts.Foreign").startswith("Refused schedule._target_=")
    assert answer("mine", "mine.parts.dataclass").startswith("Refused schedule._target_=")
    assert answer("", "mine.parts.Mine").startswith("Refused schedule._target_=")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method.amount=half"], r"^method\.amount: .*'half'.*"),
        (["method=sparsegpt", "method.scope=layer"], r"^method\.scope='layer' is not one of window, row"),
        (["method.allocation=even"], r"^method\.allocation='even' is not one of uniform, global, owl, sensitivity"),
        (["method=structured", "method.units=mlp"], r"^method\.units"),
        (["+method.amont=0.5"], r"^method\.amont: no such key; allowed are amount, pattern, scope"),
        (["+dataset.calibration.sampels=4"], r"^dataset\.calibration\.sampels: no such key; .*n_samples, seq_len"),
        (["dataset.calibration=5"], r"^dataset\.calibration"),
        (["dataset.seq_len=null"], r"^dataset\.seq_len"),
        (["dataset.seq_len=2.5"], r"^dataset\.seq_len"),
        (["dataset=text"], r"^dataset\.path is required: give dataset\.path="),
        (["model=hf"], r"^model\.name is required: give model\.name="),
        (["dataset.calibration.n_samples=???"], r"^dataset\.calibration\.n_samples is required"),
        (["seed=???"], r"^seed"),
        (["method.pattern=${nothing.here}"], r"^method: .*nothing"),
        (["name=' '"], r"^name=' ' must have"),
        (["measure.batch_sizes=4"], r"^measure\.batch_sizes"),
        (["measure.lengths=[16,0]"], r"^measure\.lengths=\[16, 0\] must be different whole numbers of at least 1"),
        (["measure.accelerate=fast"], r"^measure\.accelerate='fast' is not one of none, cuda_graphs, compile"),
        (["measure=quality_only", "measure.energy=true"], r"^measure\.energy=true needs latency=true"),
        (["recovery=finetune", "recovery.beta1=one"], r"^recovery\.beta1: .*'one'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_wrong_is_refused_by_its_full_key(overrides: list[str], says: str) -> None:
    """Short, in one line, before anything is loaded; as the command line says it: bad_inputs.py."""
    cfg = composed("model.weights=random", *overrides)
    with pytest.raises(Refused, match=says) as refused:
        config.build_parts(cfg)
    assert len(str(refused.value)) < 250
    assert "\n" not in str(refused.value)


def test_parts_are_hashable_whatever_their_values() -> None:
    """The evaluator of a sweep is found again by its parts."""
    one = config.build(composed("method=structured", "method.units=[heads,mlp]").method, "method")
    two = Structured(units=("heads", "mlp"), score="obs", refit="inputs")
    assert one == two
    assert {one: 1}[two] == 1
    assert hash(Stdlib()) == hash(config.build(composed().dataset, "dataset"))
    assert Stdlib() != Stdlib(seq_len=255)


def test_a_pattern_that_yaml_reads_as_a_number_is_refused_with_a_hint(tmp_path: Path, cli: Cli) -> None:
    """2:4 is 124 in base 60."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r/wrong.yaml").write_text(
        "defaults: [config, _self_]\nmethod:\n  pattern: 2:4\nmodel:\n  weights: random\n"
    )
    (tmp_path / "r/right.yaml").write_text('defaults: [config, _self_]\nmethod:\n  pattern: "2:4"\n')
    done = cli("-cd", "r", "-cn", "wrong", "tracking=none")
    assert done.returncode == 2
    assert re.search(r"method\.pattern=.*124.*quote", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    shown = cli("-cd", "r", "-cn", "right", "--cfg", "job")
    assert yaml.safe_load(shown.stdout)["method"]["pattern"] == "2:4"
    assert config.build(composed("method.pattern=2:4").method, "method") == Magnitude(pattern="2:4")


def test_flatten_gives_dotted_leaves() -> None:
    tree = {"a": 1, "b": {"_target_": "x.Y", "c": None, "d": {"e": [1, 2], "f": {}}}, "_target_": "z"}
    assert flatten(tree) == {"a": 1, "b.c": None, "b.d.e": [1, 2]}
    assert flatten(tree["b"], "b.") == {"b.c": None, "b.d.e": [1, 2]}
    everything = flatten(config.plain(composed()))
    assert everything["dataset.calibration.seq_len"] == 256
    assert not [key for key in everything if "_target_" in key]


# --- recipes ---------------------------------------------------------------------------------------------------


def checked(folder: Path, files: dict[str, str], *arguments: str) -> None:
    """Has a recipe's folder checked, as the command line does."""
    for name, text in files.items():
        (folder / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "r" / name).write_text(text, encoding="utf-8")
    recipes.check(["-cd", str(folder / "r"), "-cn", "recipe", *arguments])


HEAD = "defaults: [config, _self_]\n"


def test_the_recipes_of_the_repository_pass() -> None:
    for name in RECIPES:
        recipes.check(["-cd", str(ROOT / "experiments"), "-cn", name])


def test_a_command_line_without_a_recipe_passes() -> None:
    recipes.check([])
    recipes.check(["method=structured", "amount=0.2,0.4", "-m", "hydra.sweep.dir=/elsewhere"])  # the user's own words


@pytest.mark.parametrize(
    "body",
    [
        "amount: 0.3\nname: mine\n",
        "dataset: {seq_len: 32, calibration: {n_samples: 4}}\n",
        "hydra: {mode: MULTIRUN}\n",
        "hydra: {mode: MULTIRUN, sweeper: {params: {method: 'magnitude,random', amount: '0.2,0.4'}}}\n",
        "hydra: {sweeper: {params: {method.pattern: 'null,\"2:4\"', recovery.steps: 'range(10,30,10)'}}}\n",
        "hydra: {sweeper: {params: {+recovery.extra: '1,2'}, max_batch_size: 4}}\n",
        "objectives: [size/disk_mb]\nhydra: {sweeper: {direction: [minimize, minimize], n_trials: 3}}\n",
        "hydra: {launcher: {n_jobs: 2}}\n",
        "hydra: {launcher: {timeout_min: 9, cpus_per_task: 2, partition: gpu}, sweeper: {sampler: {seed: 1}}}\n",
        "hydra: {launcher: {ray: {remote: {num_cpus: 2}}}}\n",
        "hydra: {run: {dir: 'runs/mine'}, sweep: {dir: 'multirun/${now:%Y}/${name}', subdir: '${hydra.job.num}'}}\n",
    ],
)
def test_what_a_recipe_may_set_passes(tmp_path: Path, body: str) -> None:
    checked(tmp_path, {"recipe.yaml": HEAD + body})


def test_a_recipe_may_bring_options_of_its_own(tmp_path: Path) -> None:
    mine = "_target_: prune_lab.methods.magnitude.Magnitude\namount: ${amount}\npattern: null\nscope: global\n"
    preset = "defaults: [magnitude]\nscope: global\n"
    files = {
        "recipe.yaml": "defaults: [config, override method: mine, _self_]\n",
        "method/mine.yaml": mine,
        "method/p.yaml": preset,
    }
    checked(tmp_path, files)
    checked(tmp_path, files, "method=p")
    checked(tmp_path, files, "method=mine,p", "-m")


CALLBACK = "{_target_: os.mkdir, path: pwned}"
REFUSED = {
    "our callback removed": "hydra: {callbacks: {sweep: null}}",
    "env_set": "hydra: {job: {env_set: {PRUNE_LAB_ALLOW: os}}}",
    "output_subdir": "hydra: {output_subdir: ../x}",
    "logging": "hydra: {job_logging: {handlers: {file: {filename: /x}}}}",
    "logging class": "hydra: {hydra_logging: {handlers: {x: {class: logging.FileHandler, filename: x}}}}",
    "run dir above": "hydra: {run: {dir: ../x}}",
    "run dir above, later": "hydra: {run: {dir: x/../../y}}",
    "run dir above of another key": "name: ../x\nhydra: {run: {dir: 'runs/../${name}'}}",
    "run dir by the clock": "hydra: {run: {dir: '${now:/x}'}}",
    "run dir above by the clock": "hydra: {run: {dir: '${now:..}/x'}}",
    "run dir by the machine": "hydra: {run: {dir: '${hydra:runtime.cwd}/../x'}}",
    "sweep dir": "hydra: {sweep: {dir: /x}}",
    "sweep subdir": "hydra: {sweep: {subdir: ../../x}}",
    "sweep subdir of another key": "name: /x\nhydra: {sweep: {subdir: '${name}'}}",
    "launcher by a module": "hydra: {launcher: {_target_: prune_lab.runner.shutil.rmtree}}",
    "a cluster, which could answer with pickles": "hydra: {launcher: {ray: {init: {address: 'ray://evil:10001'}}}}",
    "a study's database": "hydra: {sweeper: {storage: 'sqlite:////x.db'}}",
    "a search space by code": "hydra: {sweeper: {custom_search_space: os.system}}",
    "words of sbatch": "hydra: {launcher: {setup: ['touch pwned']}}",
    "more words of sbatch": "hydra: {launcher: {additional_parameters: {wrap: touch pwned}}}",
    "environment, spaced": "name: '${ oc.env : HOME}'",
    "environment, nested": "name: '${oc.decode:${oc.env:HOME}}'",
    "environment in a part": "dataset: {seq_len: '${oc.env:SECRET,256}'}",
    "environment by an indirect name": "dtype: oc.env\nname: '${${dtype}:HOME}'",
    "environment by half a name": "dtype: env\nname: '${oc.${dtype}:HOME}'",
    "environment in the grid": "hydra: {sweeper: {params: {name: '${oc.env:HOME}'}}}",
    "environment in a key of the grid": "hydra: {sweeper: {params: {'name=${oc.env:HOME},x': y}}}",
    "environment set in the grid": "hydra: {sweeper: {params: {+hydra.job.env_set.LD_PRELOAD: x.so}}}",
    "logging in the grid": "hydra: {sweeper: {params: {hydra.job_logging.handlers.file.filename: /x}}}",
    "folder in the grid": "hydra: {sweeper: {params: {hydra.sweep.subdir: '../../x'}}}",
    "option of Hydra in the grid": "hydra: {sweeper: {params: {hydra/job_logging: none}}}",
    "deletion in the grid": "hydra: {sweeper: {params: {'~hydra.callbacks': x}}}",
    "words of Hydra's own": "hydra: {overrides: {hydra: ['+hydra.job.env_set.X=1']}}",
    "words of the task": "hydra: {overrides: {task: ['name=x']}}",
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_recipe_may_not_set_is_refused(tmp_path: Path, body: str) -> None:
    with pytest.raises(Refused, match="recipe") as refused:
        checked(tmp_path, {"recipe.yaml": f"{HEAD}{body}\n"})
    assert len(str(refused.value)) < 400


GLOBAL = f"hydra:\n  callbacks:\n    x: {CALLBACK}\n"
FOLDERS: dict[str, dict[str, str]] = {
    "hydra folder": {"hydra/launcher/basic.yaml": "_target_: os.system\n"},
    "hydra folder, deep": {"hydra/job_logging/default.yaml": "version: 1\n"},
    "global package": {"method/evil.yaml": f"# @package _global_\n{GLOBAL}"},
    "global package after a comment": {"method/evil.yaml": f"\n# @package _global_\n{GLOBAL}"},
    "global package, indented": {"method/evil.yaml": f"  # @package _global_\n{GLOBAL}"},
    "global package, tight": {"method/evil.yaml": f"#@package _global_\n{GLOBAL}"},
    "package of Hydra": {"method/evil.yaml": f"# @package hydra.callbacks.x\n{CALLBACK}\n"},
    "package below global": {"method/evil.yaml": f"# @package _global_.hydra.callbacks.x\n{CALLBACK}\n"},
    "another file at the root": {
        "method/evil.yaml": "defaults: ['/stuff@_global_.hydra.callbacks.x: cb']\n",
        "stuff/cb.yaml": f"{CALLBACK[1:-1].replace(', ', chr(10))}\n",
    },
    "another file in Hydra": {
        "method/evil.yaml": "defaults: ['/stuff@_global_: cb']\n",
        "stuff/cb.yaml": GLOBAL,
    },
    "environment in an option": {
        "method/evil.yaml": "_target_: prune_lab.methods.none.NoPruning\npattern: ${oc.env:HOME}\n",
    },
}  # fmt: skip


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS.keys())
def test_options_that_reach_out_of_their_group_are_refused(tmp_path: Path, files: dict[str, str]) -> None:
    """They are chosen on the command line, or in the recipe's own grid."""
    with pytest.raises(Refused):
        checked(tmp_path, {"recipe.yaml": HEAD, **files}, "method=evil" if "method/evil.yaml" in files else "seed=1")


def test_an_option_chosen_in_the_grid_is_looked_at_too(tmp_path: Path) -> None:
    files = FOLDERS["another file at the root"]
    grid = f"{HEAD}hydra: {{mode: MULTIRUN, sweeper: {{params: {{method: 'magnitude,evil'}}}}}}\n"
    with pytest.raises(Refused):
        checked(tmp_path, {"recipe.yaml": grid, **files})


def test_a_hydra_folder_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r/other/job_logging").mkdir(parents=True)
    (tmp_path / "r/other/job_logging/mine.yaml").write_text("version: 1\n")
    (tmp_path / "r/hydra").symlink_to("other")
    with pytest.raises(Refused):
        checked(tmp_path, {"recipe.yaml": HEAD})


def test_a_recipe_outside_the_folder_of_recipes_is_refused(tmp_path: Path) -> None:
    """`-cn ../../x/recipe` needs no -cd, and would not be looked at."""
    (tmp_path / "evil.yaml").write_text(f"# @package _global_\ndefaults: [/config, _self_]\n{GLOBAL}")
    up = os.path.relpath(tmp_path / "evil", config.CONF_DIR)
    for arguments in (["-cn", up], ["--config-name", up], [f"--config-name={up}"], ["-cn", str(tmp_path / "evil")]):
        with pytest.raises(Refused):
            recipes.check(arguments)


@pytest.mark.parametrize("form", [["-cd", "r"], ["--config-dir", "r"], ["--config-dir=r"], ["--config-d", "r"]])
def test_every_spelling_of_the_flag_is_seen(tmp_path: Path, form: list[str]) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/recipe.yaml").write_text(HEAD + GLOBAL)
    with pytest.raises(Refused, match=r"hydra\.callbacks"):
        recipes.check([*form, "-cn", "recipe"])
    with pytest.raises(Refused, match=r"hydra\.callbacks"):
        recipes.check(["seed=1", "--cfg", "job", "-cn", "recipe", "amount=0.1", *form])


def test_the_package_s_configuration_cannot_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="-cd FOLDER"):
        recipes.check(["-cp", str(tmp_path)])
    with pytest.raises(Refused, match="no such folder"):
        recipes.check(["-cd", "nowhere"])


def test_a_refused_recipe_does_nothing(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/recipe.yaml").write_text(HEAD + GLOBAL)
    done = cli("-cd", "r", "-cn", "recipe")
    assert done.returncode == 2
    assert re.match(r"prune_lab: recipe recipe: hydra\.callbacks\.x", done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r"]


# --- objectives of a search ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["perplexity"],
        ["quality/perplexty"],
        [],
        ["size/disk_mb", "no/thing"],
        ["size/dsk_mb"],
        ["quality/dense_perplexity"],
    ],
)
def test_an_objective_is_a_metric_that_can_be_improved(names: list[str]) -> None:
    with pytest.raises(Refused, match="objectives=") as refused:
        config.build_parts(composed(f"objectives=[{','.join(names)}]"))
    assert "quality/perplexity" in str(refused.value)


def test_objectives_are_as_asked_for() -> None:
    parts = config.build_parts(composed("objectives=[quality/perplexity,latency/decode_speedup]"))
    assert parts.settings.objectives == ("quality/perplexity", "latency/decode_speedup")


def test_help_lists_every_option_and_the_keys_as_they_are_now(cli: Cli, tmp_path: Path) -> None:
    """Options of the recipe's folder too."""
    (tmp_path / "r" / "method").mkdir(parents=True)
    (tmp_path / "r" / "method" / "own.yaml").write_text("_target_: prune_lab.methods.magnitude.Magnitude\n")
    shown = cli("--help", "-cd", "r", "method=wanda", "amount=0.3")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    for group in config.GROUPS:
        options = {path.stem for path in (ROOT / "conf" / group).iterdir()} | ({"own"} if group == "method" else set())
        assert f"{group}: {', '.join(sorted(options))}" in lines
    assert "amount: 0.3" in lines
    assert "  _target_: prune_lab.methods.wanda.Wanda" in lines
