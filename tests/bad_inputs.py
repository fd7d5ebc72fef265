"""The table of bad inputs: of the configuration, of recipes, of data, of checkpoints. test_bad_input.py runs it.

Each has what is put in place beforehand, the command line, and what the message must name: key, value, what is allowed.
PLACE stands for the test's folder, in arguments, files and messages alike; the small model's copy is PLACE/model.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import make_folder, story
from gguf_files import make_gguf
from model_types import tiny_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from prune_lab.models.load import TINY

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """One bad input. `flags` come first on the command line, `overrides` after those of the small model and text."""

    group: str
    name: str
    overrides: list[str]
    says: tuple[str, ...]
    prepare: Prepare = lambda place: None
    flags: list[str] = field(default_factory=list)
    small: bool = True  # whether it comes with the small model and text

    @property
    def id(self) -> str:
        """The case's name among all."""
        return f"{self.group}: {self.name}"


# --- Configuration: overrides, and what the message must hold ---

LONG = "x" * 251
_CONFIG: list[tuple[str, tuple[str, ...]]] = [
    ("amount=1.5", ("amount=1.5", "[0, 1)")),
    ("amount=1", ("amount=1", "[0, 1)")),
    ("amount=-0.1", ("amount=-0.1", "[0, 1)")),
    ("amount=nan", ("amount=nan", "[0, 1)")),
    ("amount=inf", ("amount=inf", "[0, 1)")),
    ("amount=1e400", ("amount=inf", "[0, 1)")),
    ("amount=abc", ("amount", "abc", "Float")),
    ("amount=null", ("amount",)),
    ("amount=", ("amount", "''", "Float")),
    ("amount=[0.5]", ("amount",)),
    ("amount={a:1}", ("amount",)),
    ("amount=${amount}", ("amount",)),
    ("method.amount=1.5", ("method.amount=1.5", "[0, 1)")),
    ("method=nope", ("method", "nope", "magnitude", "structured")),
    ("dataset=nope", ("dataset", "nope", "stdlib", "text")),
    ("tracking=nope", ("tracking", "nope", "mlflow", "none")),
    ("tracking.register=mine", ("tracking.register=mine", "export=none", "export=hf")),
    ("export=hf tracking.register=a/b", ("tracking.register='a/b'", "without / :")),
    ("export=hf tracking=none tracking.register=mine", ("tracking.register", "no such key")),
    ("method=../model/hf", ("method._target_", "no option of the group method")),
    ("method=/etc/passwd", ("method", "/etc/passwd")),
    ("nope=1", ("nope", "amount", "seed", "device")),
    ("method.nope=1", ("method.nope", "pattern", "scope")),
    ("+method.nope=1", ("method.nope", "pattern", "scope")),
    ("+method._args_=[1]", ("method._args_", "pattern", "scope")),
    ("+method._partial_=true", ("method._partial_", "pattern", "scope")),
    ("+nope=1", ("nope", "amount", "seed", "device")),
    ("~method", ("method",)),
    ("amount", ("amount",)),
    ("method=magnitude,structured", ("method", "magnitude,structured", "-m")),
    ("seed=-1", ("seed=-1", "[0, 2^63)")),
    ("seed=9223372036854775808", ("seed=9223372036854775808", "[0, 2^63)")),
    ("seed=1.5", ("seed", "1.5", "Integer")),
    ("seed=null", ("seed",)),
    ("objectives=[size/dsk_mb]", ("objectives=['size/dsk_mb']", "size/disk_mb")),
    ("export=perhaps", ("export", "perhaps", "bitmask", "gguf", "hf", "none", "onnx")),
    ("export=gguf export.type=q5_0", ("export.type='q5_0'", "f32, f16, bf16, q8_0, q4_0")),
    ("export=gguf export.type=null", ("export.type",)),
    ("export=onnx export.type=q8_0", ("export.type='q8_0'", "f32, f16")),
    ("export=onnx post=int8_weight_only", ("export=onnx", "post=int8_weight_only", "give export=hf, or post=none")),
    ("measure.engine=vllm", ("measure.engine='vllm'", "none, llama_cpp, onnxruntime")),
    ("measure.engine=null", ("measure.engine",)),
    ("measure.engine=onnxruntime export=hf", ("measure.engine=onnxruntime", "export=hf", "give export=onnx")),
    ("measure.engine_windows=-1", ("measure.engine_windows=-1", "at least 0")),
    ("measure.engine=llama_cpp", ("measure.engine=llama_cpp", "export=none", "export=gguf, or measure.engine=none")),
    ("measure.engine=llama_cpp export=hf", ("measure.engine=llama_cpp", "export=hf", "give export=gguf")),
    ("measure.engine=llama_cpp export=bitmask", ("measure.engine=llama_cpp", "export=bitmask", "give export=gguf")),
    ("export=gguf post=int8_weight_only", ("export=gguf", "post=int8_weight_only", "give export=hf, or post=none")),
    (
        "model.stream=true measure=quality_only method=wanda export=gguf",
        ("model.stream=true", "export=gguf", "give export=hf or export=none"),
    ),
    ("export=true", ("export=true", "give export=hf")),
    ("export=True", ("export=True", "give export=hf")),
    ("export=yes", ("export=yes", "give export=hf")),
    ("export=1", ("export=1", "give export=hf")),
    ("+export=on", ("+export=on", "give export=hf")),
    ("export=false", ("export=false", "give export=none")),
    ("export=0", ("export=0", "give export=none")),
    ("export=none,true", ("export=none,true", "give export=hf")),
    ("export.keep=1", ("export.keep", "it has none")),
    ("~export", ("export is required",)),
    ("post=sparse_bitmask", ("post=sparse_bitmask", "give export=bitmask")),
    ("post='sparse_bitmask'", ("post='sparse_bitmask'", "give export=bitmask")),
    (
        "export=bitmask post=int8_weight_only",
        ("export=bitmask", "post=int8_weight_only", "give export=hf, or post=none"),
    ),
    ("export=bitmask post=fp8", ("export=bitmask", "post=fp8", "give export=hf, or post=none")),
    (
        "model.stream=true measure=quality_only method=wanda export=bitmask",
        ("model.stream=true", "export=bitmask", "give export=hf or export=none"),
    ),
    (
        "model.stream=true measure=quality_only measure.generation_prompts=2 method=wanda",
        ("model.stream=true", "give measure.generation_prompts=0"),
    ),
    ("name=''", ("name=''", "1 to 250")),
    (f"name={LONG}", ("name='xxx", "1 to 250")),
    ("name='a\tb'", ("name='a\\tb'", "control")),
    ("name='\x1b[31mred'", ("name='\\x1b[31mred'", "control")),
    ("name=\udcff", ("'name=\\udcff'", "UTF-8")),
    ("dtype=float8", ("dtype='float8'", "float32", "bfloat16", "float16")),
    ("dtype=", ("dtype=''", "float32", "bfloat16", "float16")),
    ("device=tpu", ("device='tpu'", "auto", "cpu", "cuda")),
    ("device=meta", ("device='meta'", "auto", "cpu", "cuda")),
    ("device=cuda:99", ("device='cuda:99'", "CUDA devices")),
    ("device=cuda:-1", ("device='cuda:-1'", "auto", "cpu", "cuda")),
    ("method.pattern=124", ("method.pattern='124'", "quote")),
    ("method.pattern=5:4", ("method.pattern='5:4'", "from 1 to M")),
    ("method.pattern=2-4", ("method.pattern='2-4'", "N:M")),
    ("method.scope=nope", ("method.scope='nope'", "layer", "global")),
    ("method=sparsegpt method.scope=layer", ("method.scope='layer'", "window, row")),
    ("method=structured method.units=[nope]", ("method.units=['nope']", "mlp", "heads")),
    ("method=structured method.units=[]", ("method.units=[]", "mlp", "heads", "query_heads")),
    ("method=structured method.units=[heads,query_heads]", ("method.units=", "counted twice", "give one of")),
    ("method=structured method.refit=rows", ("method.refit='rows'", "none, bias, inputs, dense, residual")),
    ("method=wanda method.refit=bias", ("method.refit='bias'", "none, inputs, dense, residual")),
    ("method=active_experts", ("method=active_experts", "llama models have no experts")),
    ("method=active_experts amount=1", ("amount=1", "[0, 1)")),
    ("method=active_experts method.score=reap", ("method.score", "amount")),
    ("method=unstructured method.score=moe_pruner",
     ("method.score=moe_pruner", "llama models have no experts", "method.score=wanda")),
    ("method=structured method.refit=residual dataset.calibration.propagate=dense",
     ("method.refit=residual", "dataset.calibration.propagate=dense", "method.refit=inputs")),
    ("method=depth method.refit=inputs", ("method.refit='inputs'", "none, residual")),
    ("method=depth method.refit=residual dataset.calibration.propagate=dense",
     ("method.refit=residual", "dataset.calibration.propagate=dense", "method.refit=none")),
    ("method=wanda method.refit=inputs schedule=iterative schedule.rewind=weights recovery=finetune recovery.steps=9",
     ("schedule.rewind=weights", "method.refit=inputs", "schedule.rewind=lr")),
    ("method=wifv method.compensate=false", ("method.compensate: no such key", "bias for true, none for false")),
    ("method=structured method.score=nope", ("method.score='nope'", "l2", "l1", "random")),
    ("method=structured method.round_to=0", ("method.round_to=0", "at least 1")),
    ("method=experts method.score=nope", ("method.score='nope'", "reap", "frequency", "aimer")),
    ("method=experts method.round_to=0", ("method.round_to=0", "at least 1")),
    ("method=experts", ("method=experts", "llama models have no experts", "method=structured")),
    ("method=structured method.units=[hidden,mlp]", ("method.units=['hidden', 'mlp']", "give units=[hidden]")),
    ("method=structured method.units=[hidden]", ("method.score='obs'", "units=[hidden]", "minitron, random")),
    ("method=wifv method.units=[hidden]", ("method.score='wifv'", "units=[hidden]", "minitron, random")),
    ("method=structured method.score=minitron", ("method.score='minitron'", "l2", "obs")),
    ("method=structured method.units=[hidden] method.score=minitron method.refit=dense",
     ("method.refit='dense'", "none, inputs", "units=[hidden]")),
    ("method=structured method.units=[hidden] method.score=minitron method.physical=false",
     ("method.physical=false", "units=[hidden]", "give physical=true")),
    ("method=structured method.units=[hidden] method.score=random method.refit=none schedule=iterative "
     "schedule.rewind=weights recovery=finetune recovery.steps=9",
     ("schedule.rewind=weights", "method.units=[hidden]", "schedule.rewind=lr")),
    ("method=structured method.units=[hidden] method.score=minitron recovery=reconstruct",
     ("recovery=reconstruct", "method.units=[hidden]", "recovery=finetune")),
    ("method=structured method.units=[hidden] method.score=minitron model.stream=true measure=quality_only",
     ("model.stream=true", "a model in memory")),
    ("model.stream=true measure=quality_only method=active_experts",
     ("model.stream=true", "single weights or experts")),
    ("model.weights=split", ("model.weights='split'", "pretrained", "random")),
    ("schedule=iterative schedule.rounds=0", ("schedule.rounds=0", "at least 1")),
    ("schedule=iterative schedule.start=nan", ("schedule.start=nan", "at least 0")),
    (
        "schedule=iterative method.pattern='2:4'",
        ("method.pattern=2:4", "4 prunings", "schedule=one_shot", "method.pattern=null"),
    ),
    (
        "schedule=gradual recovery=finetune method=wanda method.pattern='2:4'",
        ("method.pattern=2:4", "15 prunings", "schedule=one_shot"),
    ),
    ("schedule=gradual schedule.interval=0", ("schedule.interval=0", "above 0")),
    ("schedule=gradual schedule.end=inf recovery=finetune", ("schedule.end=inf", "training of 200 steps")),
    ("recovery=finetune recovery.steps=0", ("recovery.steps=0", "at least 1")),
    ("recovery=finetune recovery.lr=-1", ("recovery.lr=-1", "(0, 1)")),
    ("recovery=finetune recovery.lr=nan", ("recovery.lr=nan", "(0, 1)")),
    ("recovery=finetune recovery.batch_size=0", ("recovery.batch_size=0", "at least 1")),
    ("recovery=finetune recovery.autocast=fp4", ("recovery.autocast='fp4'", "auto", "bfloat16", "none")),
    ("recovery=finetune recovery.router_aux_loss=-1", ("recovery.router_aux_loss=-1", "[0, 1]", "null")),
    ("recovery=distill recovery.router_aux_loss=nan", ("recovery.router_aux_loss=nan", "[0, 1]", "null")),
    ("recovery=lora recovery.router_aux_loss_by=layer", ("recovery.router_aux_loss_by='layer'", "model, block")),
    ("recovery=distill recovery.temperature=0", ("recovery.temperature=0", "(0, 1000)")),
    ("recovery=distill recovery.teacher=/nowhere",
     ("recovery.teacher='/nowhere'", "neither a folder here nor a Hub id")),
    ("recovery=reconstruct recovery.warmup=2", ("recovery.warmup=2", "[0, 1]")),
    ("recovery=reconstruct recovery.beta1=1", ("recovery.beta1=1", "[0, 1)")),
    ("recovery=reconstruct recovery.checkpoint_every=0", ("recovery.checkpoint_every=0", "at least 1 block")),
    ("recovery=reconstruct schedule=gradual", ("recovery=reconstruct", "schedule=gradual", "schedule=one_shot")),
    ("recovery=reconstruct schedule.start=0.5", ("recovery=reconstruct", "schedule.start=0")),
    ("recovery=reconstruct method=depth", ("recovery=reconstruct", "method=depth", "recovery=finetune")),
    ("recovery=lora recovery.rank=0", ("recovery.rank=0", "at least 1")),
    ("measure.pairs=3", ("measure.pairs=3", "at least 10")),
    ("measure.max_windows=0", ("measure.max_windows=0", "at least 1")),
    ("measure.kl_windows=-1", ("measure.kl_windows=-1", "at least 0")),
    ("measure.generation_prompts=-1", ("measure.generation_prompts=-1", "at least 0")),
    ("measure.generation_prompts=9", ("measure.generation_prompts=9", "at most 8")),
    ("measure.generation_tokens=15", ("measure.generation_tokens=15", "at least 16")),
    ("measure.lengths=[1000000000000]", ("measure.lengths=[1000000000000]", "context of 128")),
    ("measure.batch_sizes=[-1]", ("measure.batch_sizes=[-1]", "at least 1")),
    ("measure.tasks=[nope]", ("measure.tasks", "nope")),
    ("dataset.seq_len=1", ("dataset.seq_len=1", "at least 2")),
    ("dataset.seq_len=-32", ("dataset.seq_len=-32", "at least 2")),
    ("dataset.seq_len=1000000000000000000", ("dataset.seq_len=1000000000000000000", "context of 128")),
    ("dataset.seq_len=129", ("dataset.seq_len=129", "context of 128")),
    ("dataset.calibration.n_samples=0", ("dataset.calibration.n_samples=0", "at least 1")),
    ("method=wanda dataset.calibration.n_samples=1000000000000", ("1000000000000 are asked for", "n_samples")),
    ("method=wanda dataset.calibration.seq_len=129", ("dataset.calibration.seq_len=129", "context of 128")),
    ("hydra.run.dir=" + "d" * 300, ("File name too long",)),
    ("model.name=/nowhere/llama", ("model.name='/nowhere/llama'", "neither a folder here nor a Hub id")),
    ("model.name=./llama", ("model.name='./llama'", "neither a folder here nor a Hub id")),
    ("model.name=a/b/c", ("model.name='a/b/c'", "neither a folder here nor a Hub id")),
    ("model.name=../../etc", ("model.name='../../etc'", "neither a folder here nor a Hub id")),
    ("model.name=" + "m" * 5000, ("model.name='mmm", "neither a folder here nor a Hub id")),
    ("method=none recovery=finetune recovery.router_aux_loss=0.1",
     ("recovery.router_aux_loss=0.1", "type llama", "give null")),
    # The small model's Linears have 32 inputs.
    ("measure=quality_only method.pattern=2:7 tracking=none", ("method.pattern=2:7", "32 inputs", "multiple of 7")),
]  # fmt: skip
# Overrides with spaces in them, or flags: what Hydra or argparse would have a message of its own for.
_TYPED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a path with brackets": (
        ["dataset.path=My Drive (1)"],
        ("dataset.path=My Drive (1)", "for a text write \"dataset.path='My Drive (1)'\""),
    ),
    "a path with = and commas": (["dataset.path=a=b, c"], ("\"dataset.path='a=b, c'\"",)),
    "a path with braces": (["dataset.path=x{y}"], ("\"dataset.path='x{y}'\"",)),
    "a path with an apostrophe": (["model.name=it's"], ("\"model.name='it\\'s'\"",)),
    "a path with a comma": (["dataset.path=a,b"], ("-m", "'dataset.path=[a,b]'", "\"dataset.path='a,b'\"")),
    "no override": (["two words"], ("two words", "KEY=VALUE")),
    "a key that is none": (["a b=1"], ("a b=1", "KEY=VALUE")),
    "a flag that is none": (["--multrun"], ("--multrun: no such flag", "--multirun")),
    "a dash before an override": (["-amount=0.5"], ("-amount=0.5", "an override has no dash: amount=0.5")),
    "a flag without its value": (["-cn"], ("--config-name", "expected one argument")),
    "options of an earlier version in a sweep": (
        ["-m", "export=false,true,bitmask"],
        ("export=false,true,bitmask", "give export=none or export=hf"),
    ),
    "an option of an earlier version among others": (
        ["-m", "post=none,sparse_bitmask"],
        ("post=none,sparse_bitmask", "give export=bitmask"),
    ),
    "a key of another option": (["recovery=none", "recovery.temperature=2"], ("recovery.temperature", "steps, lr")),
    "a key of no option of a sweep": (
        ["-m", "recovery=none,lora", "recovery.temperature=2"],
        ("recovery.temperature: no such key in recovery=none,lora", "steps, lr, batch_size", "in lora also"),
    ),
}  # fmt: skip
# What `_target_` must not name; the last ones start well and are not ours.
_TARGETS = [
    "os.system", "subprocess.Popen", "builtins.eval", "Magnitude", "", "null", "prune_lab.methods.nope.Nope",
    "prune_lab.config.parts.os.system", "prune_lab.runner.shutil.rmtree", "prune_lab.runner.shutil",
    "prune_lab.runner.atomic_folder", "prune_lab.sweeps.sweep.SweepCallback",
]  # fmt: skip

CONFIG = [Bad("config", overrides[:70], overrides.split(" "), says) for overrides, says in _CONFIG]
CONFIG += [
    Bad("config", f"mix {mix}", ["dataset.calibration.source=mix", f"dataset.calibration.mix={mix}"],
        (f"dataset.calibration.mix{key}", *says))
    for mix, key, *says in (
        ("[]", "=[]", "give its parts"), ("null", "=None", "a list of {source, share, name, column}"),
        ("own", "='own'", "a list of {source"), ("[own]", "[0]='own'", "a list of {source"),
        ("{source:own,share:1}", " must be a list, in brackets"), ("3", "=3", "a list of {source"),
        ("[{source:own}]", "[0].share is required"), ("[{share:1}]", "[0].source is required"),
        ("[{source:own,share:1,3:4}]", "[0].3", "source, share"),
        ("[{source:own,share:x}]", "[0].share", "'x'", "Float"),
        *((f"[{{source:own,share:{share}}},{{source:stdlib,share:0.5}}]", f"[0].share={share}", "above 0")
          for share in ("-0.5", "nan", "inf", "0", "1.5")),
        ("[{source:own,share:0.5}]", ": its shares 0.5 sum to 0.5", "sum to 1"),
        ("[{source:own,share:0.6},{source:stdlib,share:0.6}]", ": its shares 0.6, 0.6 sum to 1.2"),
        ("[{source:nope,share:1}]", "[0].source='nope'", "own, stdlib, text, wikitext2, c4"),
        ("[{source:mix,share:1}]", "[0].source='mix'", "own, stdlib"),
        ("[{source:mix,share:1,mix:[]}]", "[0].mix", "source, share, name, column"),
        ("[{source:text,share:1}]", "[0].name is required"),
        ("[{source:own,share:0.5},{source:text,share:0.5}]", "[1].name is required"),
        ("[{source:own,share:1,name:x}]", "[0].name='x'", "source=own"),
        ("[{source:stdlib,share:1,column:x}]", "[0].column='x'", "source=stdlib"),
        ("[{source:own,share:0.5},{source:own,share:0.5}]", "[0] and mix[1]", "both shares"),
        ("[{source:own,share:0.999},{source:stdlib,share:0.001}]", "[1].share=0.001", "n_samples=128"),
    )
]  # fmt: skip
CONFIG += [
    Bad("config", name, [f"dataset.calibration.{word}" for word in words], says)
    for name, words, says in (
        ("a mix without source=mix", ["mix=[{source:own,share:1}]"],
         ("dataset.calibration.mix", "source=own", "source=mix")),
        ("a mix with another source", ["source=stdlib", "mix=[{source:own,share:1}]"],
         ("dataset.calibration.mix", "source=stdlib", "source=mix")),
        ("a mix with a name", ["source=mix", "name=x", "mix=[{source:own,share:1}]"],
         ("dataset.calibration.name='x'", "source=mix")),
        ("a mix of more parts than windows",
         ["source=mix", "n_samples=1", "mix=[{source:own,share:0.5},{source:stdlib,share:0.5}]"],
         ("dataset.calibration.mix[1].share=0.5", "n_samples=1")),
    )
]  # fmt: skip
CONFIG += [
    Bad("config", "a list in place of keys", ["dataset.calibration=[1]"],
        ("dataset.calibration is not one value", "dataset.calibration.KEY", "n_samples, seq_len, source")),
    Bad("config", "keys in place of a list", ["objectives={a:1}"], ("objectives must be a list", "objectives=[...]")),
]  # fmt: skip
CONFIG += [
    Bad("config", f"target {target!r}", [f"method._target_={target}"],
        ("method._target_=", target.replace("null", "None"), "allowed"))
    for target in _TARGETS
]  # fmt: skip
CONFIG += [
    Bad("config", " ".join(words), ["model=tiny_moe", *words], says, small=False)
    for words, says in (
        (["model.weights=nope"], ("model.weights='nope'", "pretrained, random, split")),
        (["model.weights=split", "model.stream=true"], ("weights=split", "stream=false")),
    )
]
CONFIG += [Bad("config", name, words, says, flags=["measure=quality_only"]) for name, (words, says) in _TYPED.items()]
CONFIG += [
    Bad("config", f"a folder called {name!r} as Hydra reads it", [f"dataset.path={name}"],
        (f"dataset.path={name}: Hydra reads", f"\"dataset.path='{name}'\""),
        lambda place, name=name: (place / name).mkdir())
    for name in ("[x]", "1e3", "null")
]  # fmt: skip


# --- Recipes: a file, options beside it, and what the message must hold ---
# Where one could act, it would make PLACE/made.

MKDIR = "{_target_: os.mkdir, path: PLACE/made}"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
_RECIPES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "a callback": (
        f"hydra: {{callbacks: {{evil: {MKDIR}}}}}",
        ("hydra.callbacks.evil._target_='os.mkdir'", "not allowed"),
    ),
    "a callback in the place of ours": (
        f"hydra: {{callbacks: {{sweep: {MKDIR}}}}}",
        ("hydra.callbacks.sweep", "not allowed"),
    ),
    "the environment": (
        "hydra: {job: {env_set: {PRUNE_LAB_ALLOW: os}}}\nmethod: {_target_: os.mkdir}",
        ("hydra.job.env_set.PRUNE_LAB_ALLOW='os'", "not allowed"),
    ),
    "a copied environment": ("hydra: {job: {env_copy: [HOME]}}", ("hydra.job.env_copy", "not allowed")),
    "a launcher": ("hydra: {launcher: {_target_: os.mkdir}}", ("hydra.launcher", "not allowed")),
    "a launcher's setup": ("hydra: {launcher: {setup: ['touch made']}}", ("hydra.launcher.setup", "not allowed")),
    "a sweeper": ("hydra: {sweeper: {_target_: os.mkdir}}", ("hydra.sweeper", "not allowed")),
    "a callback in the grid": (
        f"hydra: {{sweeper: {{params: {{+hydra.callbacks.x: '{MKDIR}'}}}}}}", ("hydra.sweeper.params", "not allowed"),
    ),
    "a log handler": (
        "hydra: {job_logging: {handlers: {file: {filename: PLACE/made}}}}",
        ("hydra.job_logging", "not allowed"),
    ),
    "a run folder elsewhere": ("hydra: {run: {dir: PLACE/made}}", ("hydra.run.dir", "not allowed")),
    "a sweep folder above": ("hydra: {sweep: {dir: ../made}}", ("hydra.sweep.dir='../made'", "not allowed")),
    "a run folder by the name": (
        "name: ../made\nhydra: {run: {dir: 'runs/${name}'}}", ("hydra.run.dir='runs/${name}'", "not allowed"),
    ),
    "changing the folder": ("hydra: {job: {chdir: true}}", ("hydra.job.chdir=True", "not allowed")),
    "a search path": ("hydra: {searchpath: [file:///]}", ("hydra.searchpath", "not allowed")),
    "reading the environment": ("name: ${oc.env:HOME}", ("name='${oc.env:HOME}'", "may not read the machine")),
    "reading it inside a part": ("dataset: {path: 'x${oc.env:HOME}'}", ("${oc.env:HOME}", "may not read the machine")),
    "a foreign part": ("method: {_target_: os.mkdir}", ("method._target_='os.mkdir'", "not allowed")),
    "a foreign part by way of ours": (
        "method: {_target_: prune_lab.config.parts.os.mkdir}",
        ("method._target_='prune_lab.config.parts.os.mkdir'", "allowed are"),
    ),
    "a Python object": ("name: !!python/object/apply:os.mkdir [PLACE/made]", ("recipe x", "YAML", "python/object")),
    "a YAML bomb": (BOMB, ("recipe x", "alias")),
    "an endless alias": ("name: &a [*a]", ("recipe x", "alias")),
    "deep nesting": ("name: " + "[" * 3000 + "]" * 3000, ("recipe x", "nested")),
    "too large a file": ("# " + "x" * 2**21, ("recipe x", "bytes")),
    "no YAML": ("name: [unclosed", ("recipe x", "YAML")),
    "the same key twice": ("amount: 0.1\namount: 0.2", ("recipe x", "YAML", "amount")),
    "not UTF-8": (b"name: caf\xe9", ("recipe x", "UTF-8")),
    "a control character": ('name: "a\\0b"', ("name='a\\x00b'", "control")),
    "a teacher's name with a NUL": (
        'recovery: {teacher: "a\\0b"}',
        ("recovery.teacher='a\\x00b'", "neither a folder here nor a Hub id"),
    ),
    "a text's path with a NUL": ('dataset: {test_path: "a\\0b"}', ("dataset.test_path='a\\x00b'", "names no file")),
    "a list": ("- amount", ("recipe x",)),
    "a pattern as a number": ("method: {pattern: 2:4}", ("method.pattern=", "124", "quote")),
    "a wrong value": ("amount: 7", ("amount=7.0", "[0, 1)")),
    "an endless grid": (
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: 'range(1000000000)'}}}",
        ("hydra.sweeper.params", "10000 jobs"),
    ),
    "a grid without a step": (
        "hydra: {sweeper: {params: {seed: 'range(0,1,0)'}}}",
        ("hydra.sweeper.params", "10000 jobs"),
    ),
    "a part that is no mapping": ("method: magnitude", ("method", "'override method: OPTION'")),
    "a switch in place of an export": ("export: true", ("recipe x", "export: True", "'override export: hf'")),
    "a switch that is off": ("export: off", ("recipe x", "export: ", "'override export: none'")),
    "an export as a value": ("export: hf", ("export='hf'", "'override export: OPTION'")),
    "a switch in its defaults": ("", ("recipe x", "'override export': True", "'override export: hf'")),
    "an earlier option in its defaults": ("", ("recipe x", "sparse_bitmask", "'override export: bitmask'")),
    "a switch in a sweep": (
        "hydra: {mode: MULTIRUN, sweeper: {params: {export: 'false,true'}}}",
        ("recipe x", "hydra.sweeper.params.export='false,true'", "give export=none or export=hf"),
    ),
    "a switch that is on in a sweep": (
        "hydra: {mode: MULTIRUN, sweeper: {params: {export: true}}}",
        ("recipe x", "hydra.sweeper.params.export=True", "give export=hf"),
    ),
    "an earlier option in a grid": (
        "hydra: {mode: MULTIRUN, sweeper: {grids: [{method: magnitude, post: 'none,sparse_bitmask'}]}}",
        ("recipe x", "hydra.sweeper.grids.0.post='none,sparse_bitmask'", "give export=bitmask"),
    ),
    "defaults that are no list": ("", ("recipe x", "defaults=5", "list")),
    "a default elsewhere": ("", ("defaults", "/etc/passwd")),
    "a default of Hydra": ("", ("defaults", "job_logging", "not allowed")),
}  # fmt: skip
_HEADS = {
    "a list": "",
    "a teacher's name with a NUL": "defaults: [config, override recovery: distill, _self_]",
    "a text's path with a NUL": "defaults: [config, override dataset: text, _self_]",
    "defaults that are no list": "defaults: 5",
    "a default elsewhere": "defaults: [config, /etc/passwd, _self_]",
    "a switch in its defaults": "defaults: [config, override export: true, _self_]",
    "an earlier option in its defaults": "defaults: [config, override post: sparse_bitmask, _self_]",
    "an earlier option in a grid": "defaults: [config, override hydra/sweeper: grids, _self_]",
    "a default of Hydra": "defaults: [config, override hydra/job_logging: none, _self_]",
}
# Options beside a recipe that are chosen on the command line, after the recipe itself was read.
_OPTIONS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "reads the environment": (
        "_target_: prune_lab.methods.magnitude.Magnitude\nscope: ${oc.env:HOME}\n", ("may not read the machine",),
    ),
    "global package": ("# @package _global_\nhydra: {job: {env_set: {A: b}}}\n", ("mine.yaml", "options of Hydra")),
    "hydra package": ("# @package hydra\njob: {env_set: {A: b}}\n", ("mine.yaml", "options of Hydra")),
    "foreign class": ("_target_: os.system\n", ("method._target_='os.system'", "not allowed")),
    "bomb": (BOMB, ("mine", "alias")),
    "not UTF-8": (b"scope: caf\xe9", ("mine", "UTF-8")),
}  # fmt: skip


def _write_recipe(text: str | bytes, head: str, options: dict[str, str | bytes]) -> Prepare:
    def prepare(place: Path) -> None:
        folder = place / "recipes"
        for name, content in {"x.yaml": text, **options}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            first = f"{head}\n".encode() if name == "x.yaml" else b""
            body = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(first + body.replace(b"PLACE", str(place).encode()) + b"\n")

    return prepare


def _links_to_itself(place: Path) -> None:
    """Two links double the ways through the folder with every step down."""
    _write_recipe("amount: 0.3", _HEAD, {"method/mine.yaml": "_target_: x\n"})(place)
    for name in "ab":
        (place / "recipes" / "method" / name).symlink_to(".")


_HEAD = "defaults: [config, _self_]"
_FLAGS = ["-cd", "PLACE/recipes", "-cn", "x"]
RECIPES = [
    Bad("recipe", name, [], says, _write_recipe(text, _HEADS.get(name, _HEAD), {}), _FLAGS)
    for name, (text, says) in _RECIPES.items()
]
RECIPES += [
    Bad("recipe", f"option, {name}", ["method=mine"], says,
        _write_recipe("", _HEAD, {"method/mine.yaml": text}), _FLAGS)
    for name, (text, says) in _OPTIONS.items()
]  # fmt: skip
RECIPES += [
    Bad("recipe", "options in a loop of links", [], ("is a link to a folder",), _links_to_itself, _FLAGS),
    Bad("recipe", "no such folder", [], ("-cd nowhere", "no such folder"), flags=["-cd", "nowhere"]),
    Bad("recipe", "another configuration", [], ("-cp", "-cd"), flags=["-cp", "nowhere"]),
    Bad("recipe", "no such name", [], ("nowhere",), flags=["-cn", "nowhere"]),
    Bad("recipe", "no such name in the folder", [], ("nowhere",), flags=["-cd", ".", "-cn", "nowhere"]),
    Bad("recipe", "a name with a path", [], ("-cn ../../x", "-cd FOLDER"), flags=["-cd", ".", "-cn", "../../x"]),
    Bad("recipe", "a pickle of an earlier run", [], ("--experimental-rerun", "pickle"),
        flags=["--experimental-rerun", "job.pickle"]),
]  # fmt: skip


# --- Data: files in PLACE, an override, and what the message must hold ---


def _file(name: str, content: bytes) -> Prepare:
    return lambda place: (place / name).write_bytes(content)


def _parquet(place: Path, rows: dict[str, list[Any]], kind: str = "string") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    of_kind = pa.type_for_alias(kind)
    pq.write_table(pa.table({name: pa.array(values, of_kind) for name, values in rows.items()}), place / "a.parquet")
    return place / "a.parquet"


def _cut_parquet(place: Path) -> None:
    path = _parquet(place, {"text": [story(seed) for seed in range(20)]})
    path.write_bytes(path.read_bytes()[:-40])


def _hole_in_parquet(place: Path) -> None:
    """The table of contents is whole, the pages are not."""
    path = _parquet(place, {"text": [story(seed) for seed in range(20)]})
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 400 + content[404:])


def _folder_of(*names: str) -> Prepare:
    def prepare(place: Path) -> None:
        (place / "texts").mkdir()
        for name in names:
            (place / "texts" / name).write_bytes(b"text")

    return prepare


def _links_in_a_circle(place: Path) -> None:
    (place / "a.txt").symlink_to("b.txt")
    (place / "b.txt").symlink_to("a.txt")


def _folder_linked_to_itself(place: Path) -> None:
    (place / "texts").mkdir()
    (place / "texts" / "again").symlink_to(".")


_ROW = b'{"text": "one"}\n'
_DATA: dict[str, tuple[Prepare, str, tuple[str, ...]]] = {
    "empty": (_file("a.txt", b""), "a.txt", ("there is no text",)),
    "blank": (_file("a.txt", b" \n\t\n"), "a.txt", ("there is no text",)),
    "too short": (_file("a.txt", b"The cat sees a dog.\n"), "a.txt", ("dataset.seq_len=32", "test split", "tokens")),
    "not UTF-8": (_file("a.txt", b"\xff\xfe\xfa caf\xe9 " * 500), "a.txt", ("cannot be read as text", "utf-8")),
    "UTF-16": (_file("a.txt", "\n".join(map(story, range(9))).encode("utf-16")), "a.txt", ("cannot be read as text",)),
    "broken jsonl": (
        _file("a.jsonl", b'{"text": "one"}\n{"text": "tw\n'), "a.jsonl", ("cannot be read as json",),
    ),
    "empty jsonl": (_file("a.jsonl", b""), "a.jsonl", ("there is no text",)),
    "jsonl of lists": (_file("a.jsonl", b"[1, 2]\n[3, 4]\n"), "a.jsonl", ("a.jsonl",)),
    "jsonl that is not UTF-8": (_file("a.jsonl", b'{"text": "caf\xe9"}\n'), "a.jsonl", ("cannot be read as json",)),
    "jsonl without the column": (
        _file("a.jsonl", b'{"body": "one", "id": 3}\n'), "a.jsonl", ("dataset.column='text'", "body, id"),
    ),
    "a column of numbers": (_file("a.jsonl", b'{"text": 1}\n{"text": 2}\n'), "a.jsonl", ("dataset.column='text'",)),
    "a column of nothing": (
        _file("a.jsonl", b'{"text": null}\n{"text": null}\n'), "a.jsonl", ("dataset.column='text'", "each of 2 rows"),
    ),
    "a number among texts": (_file("a.jsonl", _ROW * 50 + b'{"text": 2}\n'), "a.jsonl", ("line 51", "a number")),
    "a column of lists": (
        _file("a.jsonl", b'{"text": ["one", "two"]}\n'), "a.jsonl", ("line 1", "a list of strings", "join each"),
    ),
    "a column of objects": (_file("a.jsonl", b'{"text": {"a": 1}}\n'), "a.jsonl", ("line 1", "an object", "a")),
    "a column of chat messages": (
        _file("a.jsonl", b'{"text": [{"role": "user", "content": "one"}]}\n'), "a.jsonl",
        ("dataset.column='text'", "line 1", "chat messages", "no chat template"),
    ),
    "a column of bytes": (
        lambda place: _parquet(place, {"text": [b"one"]}, "binary"), "a.parquet", ("row 1", "bytes", "strings"),
    ),
    "an array that is cut": (_file("a.jsonl", b'[{"text": "one"}, {"te'), "a.jsonl", ("item 2", "not a complete JSON")),
    "json of another layout": (_file("a.json", b'{"train": [{"text": "one"}]}'), "a.json", ("column", "train")),
    "no gzip": (_file("a.jsonl.gz", _ROW), "a.jsonl.gz", ("cannot be read as json", "gzip")),
    "five documents": (
        _file("a.jsonl", b"".join(json.dumps({"text": f"{n} " + story(n)}).encode() + b"\n" for n in range(5))),
        "a.jsonl", ("test split", "its 5 documents are too few", "dataset.test_path=", "one txt file"),
    ),
    "no parquet": (_file("a.parquet", b"this is not parquet"), "a.parquet", ("cannot be read as parquet",)),
    "an empty parquet file": (_file("a.parquet", b""), "a.parquet", ("cannot be read as parquet",)),
    "parquet without rows": (lambda place: _parquet(place, {"text": []}), "a.parquet", ("there is no text",)),
    "parquet without the column": (
        lambda place: _parquet(place, {"body": ["one"]}), "a.parquet", ("dataset.column='text'", "body"),
    ),
    "parquet cut short": (_cut_parquet, "a.parquet", ("cannot be read as parquet",)),
    "parquet with a hole": (_hole_in_parquet, "a.parquet", ("cannot be read as parquet",)),
    "of no known kind": (_file("a.csv", b"text\none\n"), "a.csv", ("a.csv", ".txt, .jsonl, .parquet")),
    "a folder without files": (_folder_of(), "texts", ("names no file", ".txt, .jsonl, .parquet")),
    "a folder without texts": (_folder_of("a.csv"), "texts", ("names no file", ".txt, .jsonl, .parquet")),
    "links in a circle": (_links_in_a_circle, "a.txt", ("names no file",)),
    "a folder linked to itself": (_folder_linked_to_itself, "texts", ("names no file",)),
    "a folder named as a text": (lambda place: (place / "t" / "a.txt").mkdir(parents=True), "t", ("names no file",)),
    "a pipe": (lambda place: os.mkfifo(place / "a.txt"), "a.txt", ("names no file",)),
    "a pipe in a folder": (
        lambda place: ((place / "t").mkdir(), os.mkfifo(place / "t" / "a.txt")), "t", ("names no file",),
    ),
    "an absent file": (lambda place: None, "absent.txt", ("names no file",)),
    "an absent folder": (lambda place: None, "absent", ("names no file",)),
    "a glob of nothing": (lambda place: None, "*.txt", ("names no file",)),
    "too long a name": (lambda place: None, "t" * 5000, ("names no file",)),
}  # fmt: skip

DATA = [
    Bad("data", name, [f"dataset.path=PLACE/{file}"], ("dataset.path=", f"PLACE/{file}"[:40], *says), prepare)
    for name, (prepare, file, says) in _DATA.items()
]
DATA += [
    Bad("data", f"a test text that is {name}", [f"dataset.test_path=PLACE/{file}"],
        ("dataset.test_path=", f"PLACE/{file}", *says), prepare)
    for name, (prepare, file, says) in _DATA.items()
    if name in ("blank", "an absent file", "an absent folder", "a glob of nothing", "no parquet")
]  # fmt: skip
DATA += [
    Bad("data", "calibration text that is absent",
        ["method=wanda", "dataset.calibration.source=text", "dataset.calibration.name=PLACE/absent"],
        ("dataset.calibration.name='PLACE/absent'", "names no file")),
    Bad("data", "calibration text of other columns",
        ["method=wanda", "dataset.calibration.source=text", "dataset.calibration.name=PLACE/a.jsonl"],
        ("dataset.calibration.name=PLACE/a.jsonl", "dataset.calibration.column='text'", "body"),
        _file("a.jsonl", b'{"body": "one"}\n')),
    Bad("data", "a column of calibration text that is not named",
        ["method=wanda", "dataset.calibration.column=body"], ("dataset.calibration.column='body'", "source=own")),
    Bad("data", "calibration text that is tested on",
        ["method=wanda", "dataset.test_path=PLACE/a.jsonl", "dataset.calibration.source=text",
         "dataset.calibration.name=PLACE/a.jsonl"],
        ("dataset.calibration.name=PLACE/a.jsonl", "test text", "dataset.calibration.source=own"),
        _file("a.jsonl", b"".join(json.dumps({"text": story(n)}).encode() + b"\n" for n in range(900, 920)))),
    Bad("data", "a part of a mix that is absent",
        ["method=wanda", "dataset.calibration.source=mix",
         "dataset.calibration.mix=[{source:own,share:0.5},{source:text,name:PLACE/absent,share:0.5}]"],
        ("dataset.calibration.mix[1].name='PLACE/absent'", "names no file")),
    Bad("data", "a part of a mix of other columns",
        ["method=wanda", "dataset.calibration.source=mix",
         "dataset.calibration.mix=[{source:text,name:PLACE/a.jsonl,share:1}]"],
        ("dataset.calibration.mix[0].name=PLACE/a.jsonl", "dataset.calibration.mix[0].column='text'", "body"),
        _file("a.jsonl", b'{"body": "one"}\n')),
    Bad("data", "a part of a mix that no folder or Hub id has",
        ["method=wanda", "dataset.calibration.source=mix",
         "dataset.calibration.mix=[{source:c4,name:../../c4,share:1}]"],
        ("dataset.calibration.mix[0].name='../../c4'", "neither a folder here nor a Hub id")),
    Bad("data", "a part of a mix that is another part",
        ["method=wanda", "dataset.calibration.source=mix",
         "dataset.calibration.mix=[{source:text,name:PLACE/a.jsonl,share:0.5},{source:text,name:PLACE/*.jsonl,share:0.5}]"],
        ("dataset.calibration.mix[1].name=PLACE/*.jsonl", "another part of the mix"),
        _file("a.jsonl", b"".join(json.dumps({"text": story(n)}).encode() + b"\n" for n in range(900, 920)))),
    Bad("data", "calibration text of short documents",
        ["method=wanda", "dataset.calibration.source=text", "dataset.calibration.name=PLACE/a.jsonl"],
        ("dataset.calibration.name=PLACE/a.jsonl", "128 are asked for", "dataset.calibration.join=true"),
        _file("a.jsonl", b"".join(json.dumps({"text": f"{n} one two"}).encode() + b"\n" for n in range(900)))),
    Bad("data", "a corpus whose folder is another", ["model=hf", "model.name=PLACE/model", "dataset=wikitext2",
        "dataset.name=PLACE/model"], ("dataset.name='PLACE/model'", "wikitext-2-raw-v1/train"), small=False),
    Bad("data", "a corpus of no possible name", ["model=hf", "model.name=PLACE/model", "dataset=c4",
        "dataset.name=../../c4"], ("dataset.name='../../c4'", "neither a folder here nor a Hub id"), small=False),
    Bad("data", "a store that is no database", [], ("tracking", "mlflow.db", "not a database"),
        _file("mlflow.db", b"this is no database " * 300)),
]  # fmt: skip


# --- Checkpoints: what is done to PLACE/model, and what the message must hold ---

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def _config(**changes: Any) -> Prepare:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def _text(file: str, text: str) -> Prepare:
    return lambda model: (model / file).write_text(text)


def _without(pattern: str) -> Prepare:
    return lambda model: [file.unlink() for file in model.glob(pattern)]


def _weight(change: Callable[[Tensor], Tensor | None]) -> Prepare:
    def save(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        changed = change(tensors.pop(WEIGHT))
        tensors |= {} if changed is None else {WEIGHT: changed.contiguous()}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return save


def _weights(change: Callable[[bytes], bytes]) -> Prepare:
    def write(model: Path) -> None:
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return write


def _pickle(file: str, keep: bool) -> Prepare:
    """A checkpoint of the old kind, which would load if anyone asked for it."""

    def write(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        if not keep:
            (model / "model.safetensors").unlink()
        torch.save(tensors, model / file)

    return write


def _index(file: str) -> Prepare:
    """An index of shards all of which are `file`, made here as a copy or a pickle of the weights."""

    def write(model: Path) -> None:
        keys = load_file(model / "model.safetensors")
        shutil.copy(model / "model.safetensors", model / file)
        if file.endswith(".bin"):
            torch.save(keys, model / file)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(keys, file)}))
        (model / "model.safetensors").rename(model / "other.safetensors")

    return write


def _code(model: Path) -> None:
    """What config.json asks for lies beside it, and would make PLACE/made."""
    (model / "code.py").write_text(f"import os\nos.mkdir({str(model.parent / 'made')!r})\n")
    _config(model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})(model)


def _tokenizer_code(model: Path) -> None:
    (model / "code.py").write_text(f"import os\nos.mkdir({str(model.parent / 'made')!r})\n")
    (model / "tokenizer.json").unlink()
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "code.Mine"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))


def _tokenizer_settings(**changes: Any) -> Prepare:
    def change(model: Path) -> None:
        config = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(config | changes))

    return change


def _other_tokenizer(model: Path) -> None:
    for file in Path(TINY).glob("tokenizer*"):
        shutil.copy(file, model)


def _tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Prepare:
    def save(model: Path) -> None:
        tensors = change(load_file(model / "model.safetensors"))
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(copies, model / "model.safetensors", metadata={"format": "pt"})

    return save


def _unmerged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    factors = {WEIGHT.replace("weight", f"lora_{side}.weight"): torch.zeros(4, 4) for side in "AB"}
    tensors[WEIGHT.replace("weight", "base_layer.weight")] = tensors.pop(WEIGHT)
    return tensors | factors


def _in_few_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors.pop(WEIGHT)
    parts = {"qweight": torch.zeros(4, 4, dtype=torch.int32), "scales": torch.zeros(1, 4)}
    return tensors | {WEIGHT.replace("weight", part): tensor for part, tensor in parts.items()}


_BEYOND = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
_ADAPTER = json.dumps({"base_model_name_or_path": "someone/base", "peft_type": "LORA"})
_NOT_JSON = ("model.name=", "PLACE/model", "config.json", "JSON")
_NOT_LOADED = ("model.name=", "PLACE/model", "cannot be loaded")
_CHECKPOINTS: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "of an unknown family": (
        _config(model_type="mystery"), ("'mystery'", "model_type in config.json", "newer transformers"),
    ),
    "of a family that is code": (_code, ("'mine'", "code that comes with a model is not run")),
    "with attention from the Hub": (
        _config(attn_implementation="someone/kernel"), ("model.name=", "config.json", "'someone/kernel'"),
    ),
    "with attention of its text part from the Hub": (
        _config(model_type="gemma3", attn_implementation={"text_config": "someone/kernel"}),
        ("model.name=", "config.json", "'someone/kernel'"),
    ),
    "an adapter": (_text("adapter_config.json", _ADAPTER), ("model.name=", "adapter_config.json", "merge")),
    "quantized by others": (
        _config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantized already", "gptq"),
    ),
    "said to be in 8-bit floats": (
        _config(quantization_config={"quant_method": "fp8"}),
        ("quantized already", "'fp8'", "take quantization_config out of config.json"),
    ),
    "of images alone": (_config(model_type="vit"), ("'vit'", "is no language model", "AutoModelForImageTextToText")),
    "without a config": (_without("config.json"), ("model.name=", "PLACE/model", "config.json")),
    "with a broken config": (_text("config.json", "{nope"), _NOT_JSON),
    "with a deeply nested config": (_text("config.json", "[" * 100_000), _NOT_JSON),
    "with a config that is a list": (_text("config.json", "[1, 2]"), _NOT_JSON),
    "with a size in words": (_config(hidden_size="wide"), ("model.name=", "hidden_size")),
    "with a negative size": (_config(intermediate_size=-48), ("model.name=", "config.json", "intermediate_size=-48")),
    "with a huge width": (_config(hidden_size=10**12), ("model.name=", "config.json", "hidden_size=1000000000000")),
    "with a thousand million blocks": (
        _config(num_hidden_layers=10**9), ("model.name=", "config.json", "num_hidden_layers=1000000000"),
    ),
    "without weights": (_without("*.safetensors"), ("model.name=", "no weights", "model.weights=random")),
    "a pickle": (_pickle("pytorch_model.bin", keep=False), ("model.name=", "pytorch_model.bin", "safetensors")),
    "a pickle named as safetensors": (_pickle("model.safetensors", keep=False), _NOT_LOADED),
    "an index of pickles": (
        _index("pytorch_model.bin"),
        ("model.name=", "model.safetensors.index.json", "pytorch_model.bin", "*.safetensors"),
    ),
    "an index that leaves the folder": (
        _index("../elsewhere.safetensors"), ("model.name=", "model.safetensors.index.json", "../elsewhere.safetensors"),
    ),
    "a broken index": (
        _text("model.safetensors.index.json", '{"weight_map": 3}'), ("model.name=", "model.safetensors.index.json"),
    ),
    "with a NaN": (
        _weight(lambda weight: weight.index_fill(1, torch.tensor(5), float("nan"))), ("model.name=", WEIGHT, "NaN"),
    ),
    "with infinities": (_weight(lambda weight: weight / 0), ("model.name=", WEIGHT, "infinite")),
    "with values beyond its type": (
        _weight(lambda weight: weight.double() + 1e300), ("model.name=", WEIGHT, "infinite"),
    ),
    "with a weight missing": (_weight(lambda weight: None), ("model.name=", WEIGHT)),
    "with a weight of another shape": (_weight(lambda weight: torch.ones(7, 32)), _NOT_LOADED),
    "with a weight of more dimensions": (_weight(lambda weight: weight[None]), _NOT_LOADED),
    "with more blocks than it says": (
        _config(num_hidden_layers=1, layer_types=None), ("model.name=", "1 more blocks", "num_hidden_layers=1"),
    ),
    "with fewer blocks than it says": (
        _config(num_hidden_layers=3, layer_types=None), ("model.name=", "2 blocks", "num_hidden_layers=3"),
    ),
    "with biases that it does not say": (
        _tensors(lambda tensors: tensors | {WEIGHT.replace("weight", "bias"): torch.ones(48)}),
        ("model.name=", WEIGHT.replace("weight", "bias"), "no place for", "mlp_bias"),
    ),
    "without a head": (_config(tie_word_embeddings=False), ("lm_head.weight", "tie_word_embeddings=true")),
    "of a compiled model": (
        _tensors(lambda tensors: {f"_orig_mod.{name}": t for name, t in tensors.items()}),
        ("model.name=", "torch.compile", "_orig_mod"),
    ),
    "of a wrapped model": (
        _tensors(lambda tensors: {f"policy.{name}": t for name, t in tensors.items()}), ("model.name=", "'policy.'"),
    ),
    "of an adapter that is not merged": (_tensors(_unmerged), ("model.name=", "base_layer", "merge")),
    "in few bits without a config of them": (_tensors(_in_few_bits), ("model.name=", "qweight", "GPTQ")),
    "cut short": (_weights(lambda content: content[: len(content) // 2]), _NOT_LOADED),
    "with an empty file": (_weights(lambda content: b""), _NOT_LOADED),
    "with a header without end": (_weights(lambda content: struct.pack("<Q", 2**62) + content[8:]), _NOT_LOADED),
    "with tensors beyond the file": (_weights(lambda content: struct.pack("<Q", len(_BEYOND)) + _BEYOND), _NOT_LOADED),
    "without a tokenizer": (_without("tokenizer*"), ("model.name=", "tokenizer.json")),
    "with a broken tokenizer": (_text("tokenizer.json", '{"version": "1.0", '), ("model.name=", "tokenizer.json")),
    "with an empty tokenizer": (_text("tokenizer.json", "{}"), ("model.name=", "tokenizer.json")),
    "with a tokenizer that is code": (_tokenizer_code, ("model.name=", "tokenizer.json")),
    "with a tokenizer of another model": (
        _other_tokenizer,
        ("tokenizer", "vocabulary has 300", "do not belong together"),
    ),
}  # fmt: skip


def _of_copy(damage: Prepare) -> Prepare:
    return lambda place: damage(place / "model")


CHECKPOINTS = [
    Bad("checkpoint", name, ["model.name=PLACE/model"], says, _of_copy(damage))
    for name, (damage, says) in _CHECKPOINTS.items()
]
CHECKPOINTS += [
    Bad("checkpoint", "with a chat template that takes no prompt",
        ["model.name=PLACE/model", "measure.generation_prompts=2"],
        ("measure.generation_prompts=2", "does not take: no\\x1b[2J system message", "measure.generation_prompts=0"),
        _of_copy(_tokenizer_settings(chat_template="{{ raise_exception('no\x1b[2J system message') }}"))),
    Bad("checkpoint", "with a chat template that renders no prompt",
        ["model.name=PLACE/model", "measure.generation_prompts=2"],
        ("measure.generation_prompts=2", "no token", "measure.generation_prompts=0"),
        _of_copy(_tokenizer_settings(chat_template="{# nothing #}"))),
    Bad("checkpoint", "with a chat template beyond its context",
        ["model.name=PLACE/model", "measure.generation_prompts=2"],
        ("measure.generation_prompts=2", "room for 64", "measure.generation_prompts=0"),
        _of_copy(_tokenizer_settings(chat_template="x" * 500))),
    # These configs want the query heads to divide the hidden size, and 3 do not divide 40; a Mistral has no biases.
    *(Bad("checkpoint", f"whose config cannot hold what is left: {family}",
          ["model.name=PLACE/odd", "method=structured", "method.units=[heads]", "amount=0.25", "tracking=none"],
          ("method.amount=0.25", "3 of 4 KV groups", "must divide hidden_size=40", "amount=0.5", *says),
          lambda place, family=family, of=of: make_folder(place / "odd", family, hidden_size=40, num_attention_heads=4,
                                                          num_key_value_heads=4, num_hidden_layers=1, **of))
      for family, of, says in (
          ("gemma2", {"head_dim": 10}, ()), ("llama", {"attention_bias": True}, ("mistral", "attention_bias=True")),
      )),
    Bad("checkpoint", "whose config cannot hold the query heads that are left",
        ["model.name=PLACE/odd", "method=structured", "method.units=[query_heads]", "amount=0.25", "tracking=none"],
        ("method.amount=0.25", "3 of 4 query heads of a KV group", "must divide hidden_size=40", "2 (amount=0.5)"),
        lambda place: make_folder(place / "odd", "gemma2", hidden_size=40, num_attention_heads=4,
                                  num_key_value_heads=1, head_dim=10, num_hidden_layers=1)),
]  # fmt: skip

# What a stock config cannot hold is refused before the weights are read: here they are another model's.


def _damaged(family: str, **changes: Any) -> Prepare:
    return lambda place: shutil.copy(
        place / "model" / "model.safetensors", make_folder(place / "odd", family, **changes) / "model.safetensors"
    )


CHECKPOINTS += [
    Bad(
        "checkpoint",
        f"whose query heads have a KV head each: {family}",
        ["model.name=PLACE/odd", "method=structured", "method.units=[query_heads]", "tracking=none"],
        ("method.units=[query_heads]", family, "its own KV head", "method.units=[mlp]"),
        _damaged(family, **changes),
    )
    for family, changes in (("gpt2", {}), ("opt", {}), ("gpt_neox", {}), ("llama", {"num_key_value_heads": 4}))
]
CHECKPOINTS += [
    Bad("checkpoint", f"whose config cannot hold fewer heads: {family}{', half' * ('0.5' in str(changes))}",
        ["model.name=PLACE/odd", "method=structured", "method.units=[mlp,heads]", "amount=0.5", "tracking=none"],
        ("method.units=[mlp,heads]", f"of {groups} KV groups", f"stock {family} config", "method.units=[mlp] or"),
        _damaged(family, **changes))
    for family, groups, changes in (
        ("gpt2", 4, {}), ("opt", 4, {}), ("gpt_neox", 4, {}),
        ("phi3", 2, {"original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}),
        ("phi3", 2, {"original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5,
            "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}}),
    )
]  # fmt: skip
CHECKPOINTS += [
    *(Bad("checkpoint", f"whose hidden size cannot be smaller: {family}",
          ["model.name=PLACE/odd", "method=structured", "method.units=[hidden]", "method.score=minitron",
           *amount.split(), "tracking=none"], says,
          lambda place, family=family, of=of: make_folder(place / "odd", family, **of))
      for family, amount, of, says in (
          ("gpt_neox", "amount=0.25", {}, ("method.units=[hidden]", "gpt_neox", "query_key_value.weight")),
          ("llama", "amount=0.2", {"mlp_bias": True},
           ("method.units=[hidden]", "26 of 32 channels", "hidden_size=32", "mlp_bias=True", "24 (amount=0.25)")),
          ("qwen2", "amount=0.2 method.round_to=64", {}, ("method.round_to=64", "32 channels of the hidden size")),
      )),
    Bad("checkpoint", "whose logits are scaled by the hidden size",
        ["model.name=PLACE/odd", "method=structured", "method.units=[hidden]", "method.score=minitron",
         "amount=0.25", "tracking=none"], ("method.units=[hidden]", "minicpm3", "scaled by the hidden size"),
        lambda place: tiny_folder(place / "odd", "minicpm3")),
    Bad("checkpoint", "without norms that matrices read",
        ["model.name=PLACE/odd", "method=structured", "method.units=[hidden]", "method.score=minitron",
         "tracking=none"], ("method.score=minitron", "olmo2", "method.score=random"),
        lambda place: tiny_folder(place / "odd", "olmo2")),
    Bad("checkpoint", "whose blocks are numbered",
        ["model.name=PLACE/odd", "method=depth", "amount=0.5", "tracking=none"],
        ("scale_attn_by_inverse_layer_idx=true",), _damaged("gpt2", scale_attn_by_inverse_layer_idx=True)),
    Bad("checkpoint", "that no block can leave",
        ["model.name=PLACE/odd", "method=depth", "amount=0.5", "tracking=none"],
        ("method.amount=0.5", "2 of 3 blocks", "minicpm3", "none can", "Give a smaller amount"),
        lambda place: tiny_folder(place / "odd", "minicpm3")),
    Bad("checkpoint", "whose experts have no gates that are seen",
        ["model.name=PLACE/odd", "method=unstructured", "method.score=moe_pruner", "tracking=none"],
        ("method.score=moe_pruner", "llama4_text", "not called with states", "method.score=wanda"),
        lambda place: tiny_folder(place / "odd", "llama4_text")),
    Bad("checkpoint", "whose router takes two experts whatever its config says",
        ["model.name=PLACE/odd", "method=active_experts", "tracking=none"],
        ("method=active_experts", "phimoe", "no field of its config changes how many experts"),
        lambda place: tiny_folder(place / "odd", "phimoe")),
    Bad("checkpoint", "whose MLPs are not described",
        ["model.name=PLACE/odd", "method=depth", "method.refit=residual", "tracking=none"],
        ("method.refit=residual", "olmo2", "method.refit=none"), lambda place: tiny_folder(place / "odd", "olmo2")),
]  # fmt: skip


def _cut_by_nobody(place: Path) -> None:
    """A tokenizer that cuts text into words by a pattern of its own."""
    path = make_folder(place / "odd", "llama") / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


# What llama.cpp does not load, or computes otherwise: the model, more words, and what the message must hold.
CHECKPOINTS += [
    Bad("checkpoint", f"exported as GGUF, {name}", ["model.name=PLACE/odd", "export=gguf", "tracking=none", *words],
        says, prepare)
    for name, prepare, words, says in (
        ("of another family", lambda place: make_folder(place / "odd", "gpt2"), ["method=wanda"],
         ("export=gguf", "'gpt2'", "gemma3_text, llama, mistral", "Give export=hf")),
        ("of a found family", lambda place: tiny_folder(place / "odd", "olmo2"), ["method=none"],
         ("export=gguf", "'olmo2'", "llama, mistral", "Give export=hf")),
        ("with another activation", lambda place: make_folder(place / "odd", "llama", hidden_act="relu"), [],
         ("export=gguf", "hidden_act=relu", "hidden_act=silu", "give export=hf")),
        ("with fewer heads than it can have", lambda place: make_folder(place / "odd", "phi3"),
         ["method=structured", "method.units=[heads]"],
         ("export=gguf", "phi3", "heads x head_dim = hidden_size", "give method.units=[mlp]")),
        ("with a pattern that has no name", _cut_by_nobody, ["method=wanda"],
         ("export=gguf", "llama.cpp has no name for", "[a-z]+", "give export=hf")),
    )
]  # fmt: skip

# GGUF files: what is made in PLACE/m.gguf, and what the message must hold.


def _gguf(cut: Callable[[bytes], bytes] = lambda content: content, **changes: Any) -> Prepare:
    def make(place: Path) -> None:
        path = make_gguf(place / "m.gguf", **changes)
        path.write_bytes(cut(path.read_bytes()))

    return make


def _gguf_of(weight: float) -> Prepare:
    """A file one of whose norms is of one number: the last tensor of the file."""

    def make(place: Path) -> None:
        path = make_gguf(place / "m.gguf", "F32")
        path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", weight))

    return make


_LACKS = ("model.name=", "PLACE/m.gguf", "lacks the weights")
_ELSE = ("model.name=", "PLACE/m.gguf", "compute", "Hub's layout")
_GGUFS: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "that is none": (_file("m.gguf", b"this is a text " * 9), ("name='PLACE/m.gguf'", "b'this'", "b'GGUF'")),
    "that is empty": (_file("m.gguf", b""), ("name='PLACE/m.gguf'", "it is empty")),
    "that is a safetensors file": (
        lambda place: shutil.copy(place / "model" / "model.safetensors", place / "m.gguf"),
        ("name='PLACE/m.gguf'", "b'GGUF'"),
    ),
    "cut in its weights": (_gguf(lambda content: content[:-40]), ("name='PLACE/m.gguf'", "cut off", "fetch it again")),
    "cut in half": (_gguf(lambda content: content[: len(content) // 2]), ("name='PLACE/m.gguf'", "fetch it again")),
    "cut in its header": (_gguf(lambda content: content[:2000]), ("name='PLACE/m.gguf'", "ends", "fetch it again")),
    "of its magic alone": (_file("m.gguf", b"GGUF"), ("name='PLACE/m.gguf'", "ends", "fetch it again")),
    "of nonsense": (_file("m.gguf", b"GGUF\3\0\0\0" + b"\x7f" * 900), ("name='PLACE/m.gguf'", "fetch it again")),
    "of an old version": (
        _gguf(lambda content: content[:4] + b"\1" + content[5:]), ("name='PLACE/m.gguf'", "version 1", "2 and 3"),
    ),
    "of the other byte order": (
        _gguf(lambda content: content[:4] + b"\0\0\0\3" + content[8:]), ("name='PLACE/m.gguf'", "byte order"),
    ),
    "of an unknown family": (_gguf(architecture="bert"), ("'bert'", "llama", "qwen3")),
    "without a family": (_gguf(general__architecture=None, architecture=""), ("''", "llama", "qwen3")),
    "of a family that transformers does not read": (
        _gguf(architecture="gemma"), ("model.name=", "PLACE/m.gguf", "cannot be read as GGUF", "gemma"),
    ),
    "that is split": (_gguf(split__count=3), ("name='PLACE/m.gguf'", "one of 3 parts", "llama-gguf-split --merge")),
    "of an adapter": (_gguf(general__type="adapter"), ("name='PLACE/m.gguf'", "adapter", "whole model")),
    "with scaled rotations": (_gguf(llama__rope__scaling__type="yarn"), (*_ELSE, "rope.scaling.type=yarn")),
    "with rotary factors": (_gguf(tensors={"rope_freqs.weight": (4,)}), (*_ELSE, "rope_freqs.weight")),
    "with biases": (_gguf(tensors={"blk.0.attn_q.bias": (32,)}), (*_ELSE, "blk.0.attn_q.bias")),
    "with experts": (_gguf(llama__expert_count=4), (*_ELSE, "llama.expert_count=4")),
    "with more blocks than it says": (_gguf(llama__block_count=1), (*_ELSE, "blk.1.")),
    "with fewer blocks than it says": (_gguf(llama__block_count=3), (*_LACKS, "model.layers.2.")),
    "of other widths than it says": (_gguf(llama__feed_forward_length=96), (*_LACKS, "mlp.")),
    "of other heads than it says": (_gguf(llama__attention__head_count=8), ("model.name=", "PLACE/m.gguf")),
    "with a huge width": (
        _gguf(llama__embedding_length=2**31), ("model.name=" "'PLACE/m.gguf'", "hidden_size=2147483648"),
    ),
    "without a tokenizer": (_gguf(tokenizer__ggml__model=None), ("model.name=", "PLACE/m.gguf", "tokenizer")),
    "with a tokenizer that is not known": (
        _gguf(tokenizer__ggml__model="rwkv"), ("model.name=", "PLACE/m.gguf", "tokenizer", "'rwkv'"),
    ),
    "with a NaN": (_gguf_of(float("nan")), ("model.name=", "PLACE/m.gguf", "NaN")),
}  # fmt: skip
CHECKPOINTS += [
    Bad("checkpoint", f"a GGUF file {name}", ["model.name=PLACE/m.gguf"], says, prepare)
    for name, (prepare, says) in _GGUFS.items()
]
CHECKPOINTS += [
    Bad("checkpoint", "a GGUF file that is absent", ["model.name=PLACE/m.gguf"],
        ("name='PLACE/m.gguf'", "no file here", "hf download")),
    Bad("checkpoint", "a GGUF file of the Hub", ["model.name=me/model-GGUF/model-Q4_K_M.gguf"],
        ("name='me/model-GGUF/model-Q4_K_M.gguf'", "no file here", "hf download REPOSITORY FILE.gguf")),
    Bad("checkpoint", "a GGUF file as a teacher", ["recovery=distill", "recovery.teacher=m.gguf"],
        ("recovery.teacher='m.gguf'", "no file here")),
    Bad("checkpoint", "a folder of GGUF files", ["model.name=PLACE/files"],
        ("name='PLACE/files'", "only GGUF files (a.gguf, b.gguf)", "model.name=PLACE/files/a.gguf"),
        lambda place: [_file(f"files/{name}.gguf", b"GGUF")(place) for name in "ab" if (place / "files").mkdir(
            exist_ok=True) is None]),
    Bad("checkpoint", "a GGUF file beside its config", ["model.name=PLACE/model"],
        ("name='PLACE/model'", "only GGUF files (m.gguf)", "model.name=PLACE/model/m.gguf"),
        lambda place: (place / "model" / "model.safetensors").rename(place / "model" / "m.gguf")),
    Bad("checkpoint", "a file of weights alone", ["model.name=PLACE/model/model.safetensors"],
        ("name='PLACE/model/model.safetensors'", "give its folder", "a GGUF file")),
]  # fmt: skip

TABLE = [*CONFIG, *RECIPES, *DATA, *CHECKPOINTS]
