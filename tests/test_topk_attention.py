"""topk_attention.py against vectors of independent implementations (see data/topk_attention/README.md) and loops."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import topk_attention as T
from common import cli, cluster
from common.cli import BadInput

DATA = Path(__file__).parent / "data" / "topk_attention"
close = torch.testing.assert_close
read_tensors = lambda path: pytest.importorskip("safetensors.torch").load_file(path)
VECTORS = read_tensors(DATA / "attn_vectors.safetensors")
CASES = json.loads((DATA / "attn_vectors.json").read_text())
PLAIN = [n for n, c in CASES.items() if n not in ("ties", "merge", "stats") and not (c["group"] or c["sink"])]
EXPECTED = read_tensors(DATA / "tiny_llama_expected.safetensors")
IDS = EXPECTED["input_ids"].long()
W = cluster.World(0, 1, torch.device("cpu"))
vector = lambda case, *names, dtype=torch.float64: [VECTORS[f"{case}.{n}"].to(dtype) for n in names]
tiny = functools.cache(lambda dtype=torch.float64: T.Llama.from_pretrained(DATA / "tiny_llama", dtype))
tiny_store = lambda model, n=383, **how: T.prefill(model, IDS[:n], T.KVStore(dtype=model.norm.weight.dtype), **how)
stored = lambda k, v: (store := T.KVStore(dtype=k.dtype)).put(0, k, v) or store
metrics = lambda folder: [json.loads(x) for x in Path(folder, "metrics.jsonl").read_text().splitlines()[1:]]


def problem(Hq=4, Hk=2, rows=1, N=200, M=3, D=16, seed=0, dtype=torch.float64, front=()):
    g = torch.Generator().manual_seed(seed)
    shapes = ((Hq, rows, D), *[(Hk, N, D)] * 2, *[(Hk, M, D)] * 2)
    return [torch.randn(*front, *s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype,tol", ((torch.float64, 1e-10), (torch.float32, 2e-5)))
@pytest.mark.parametrize("case", PLAIN)
def test_vectors(case, dtype, tol):
    c = CASES[case]
    q, k, v, ks, vs, want = vector(case, "q", "k", "v", "ks", "vs", "out", dtype=dtype)
    q = q * (c["scale"] * math.sqrt(c["D"]))  # the vectors' scale in place of D^-0.5
    close(T.topk_attention(q, k, v, c["topk"], *([ks, vs] if c["M"] else [])), want, atol=tol, rtol=tol)
    suffix = (x.view(len(k), -1, c["D"]) for x in (ks, vs))
    close(stored(k, v).attend(0, q, c["topk"], *suffix), want, atol=tol, rtol=tol)
    _, rows = T.search(q.reshape(len(k), -1, c["D"]), k, min(c["topk"], c["N"]))
    assert torch.equal(rows.reshape(*q.shape[:2], -1).sort().values, VECTORS[f"{case}.idx"].long())


@pytest.mark.parametrize("rows,M,N,top", ((1, 1, 50, 7), (5, 9, 300, 20), (1, 3, 5000, 90), (3, 4, 0, 5)))
def test_the_fast_form_is_the_method(rows, M, N, top):
    batch = problem(6, 2, rows, N, M, D=12, seed=N, front=(2,))
    q, k, v, ks, vs = (x[1] for x in batch)
    want = T.topk_attention(*batch[:3], top, *batch[3:])[1]
    close(T.topk_attention(q, k, v, top, ks, vs), want)
    close(stored(k, v).attend(0, q, top, ks, vs), want)
    for h in range(6):  # by hand: one head, one query at a time
        for t in range(rows):
            s = k[h // 3] @ q[h, t]
            best, seen = s.argsort(descending=True)[:top], M - rows + t + 1
            x = torch.cat([s[best], ks[h // 3, :seen] @ q[h, t]]) / math.sqrt(12)
            close(want[h, t], x.softmax(0) @ torch.cat([v[h // 3][best], vs[h // 3, :seen]]))
    with pytest.raises(ValueError, match="top must be a count of rows, at least 1"):
        T.topk_attention(q, k, v, 0.02)
    half = [x.bfloat16() for x in (q, k, v, ks, vs)]
    exact = T.topk_attention(*(x.double() for x in half[:3]), top, *(x.double() for x in half[3:]))
    close(stored(*half[1:3]).attend(0, half[0], top, *half[3:]).double(), exact, atol=2e-2, rtol=2e-2)


def test_parts_merge_and_a_part_may_be_empty():
    *parts, o, l = vector("merge", "out_a", "lse_a", "out_b", "lse_b", "out", "lse")
    close(T.merge_lse(*parts), (o, l))
    empty = torch.zeros_like(o), torch.full_like(l, -math.inf)
    for part in ((o, l), empty):
        close(T.merge_lse(*part, *empty), part)


@pytest.mark.parametrize("name,s", {
    "random": torch.randn(3, 9001, generator=torch.Generator().manual_seed(0)), "constant": torch.full((2, 5000), 0.25),
    "ascending": torch.arange(7000.0)[None], "short": torch.rand(2, 3, 17), "double": torch.rand(2, 5000).double(),
    "padded": torch.cat([torch.full((2, 4000), -math.inf), torch.arange(6000.0).view(2, -1)], dim=1),
}.items())  # fmt: skip
def test_exact_topk_is_torchs(name, s):
    for k in {0, 1, 2, 13, s.shape[-1] // 100 + 1, s.shape[-1] // 5, s.shape[-1]}:
        value, index = T.exact_topk(s, k)
        assert value.shape == index.shape == (*s.shape[:-1], k) and torch.equal(s.gather(-1, index), value)
        assert torch.equal(value.sort().values, s.topk(k).values.sort().values)
        assert all(len(set(row)) == k for row in index.flatten(0, -2).tolist())


def test_a_step_is_handed_the_chosen_rows_alone():
    q, k, v, ks, vs = problem(N=1000, dtype=torch.float32)
    store = stored(k, v)
    scores, values = store.rows(0, q.view(2, 2, 16), 20)
    assert scores.nbytes + values.nbytes == 4 * 20 * (4 + 4 * 16) and store.nbytes == 2 * 2 * 1000 * 16 * 4
    read = T.search(q.view(2, 2, 16), k, 20)[1].flatten(1)
    want = store.attend(0, q, 20, ks, vs)
    store.layers[0][1][torch.ones(2, 1000, dtype=torch.bool).scatter(1, read, False)] = math.nan
    close(store.attend(0, q, 20, ks, vs), want)
    assert sorted(T.first_and_recent(q.view(2, 2, 16), k, 9)[1][1, 1].tolist()) == [0, 1, 2, 3, *range(995, 1000)]
    scores, rows = T.random_rows(q.view(2, 2, 16), k, 9)  # the baselines do not look at the keys
    close(T.key_scores(q.view(2, 2, 16), k).gather(-1, rows), scores)
    assert len(set(rows[0, 0].tolist())) == 9 and not torch.equal(rows[0], rows[1])
    size = T.memory(2**14)
    assert size["handed"] == 8 * 163 * (4 + 4 * 64) and size["handed"] < size["peak"] < size["dense"] / 4


def test_save_and_load(tmp_path, monkeypatch):
    model, path = tiny(torch.float32), tmp_path / "c.pt"
    store = tiny_store(model, text="a document")
    store.save(path)
    back = T.KVStore.load(path)
    assert back.n == 383 and back.meta == store.meta and [*tmp_path.iterdir()] == [path]
    assert torch.equal(T.decode(model, IDS[383:], back, 8), T.decode(model, IDS[383:], store, 8))
    with pytest.raises(BadInput, match="nothing of yours is overwritten"):
        store.save(path)
    for part in ("q_proj", "k_proj", "v_proj"):  # a fine-tuned model with the same norms
        tuned = T.Llama(model.config).requires_grad_(False)
        tuned.load_state_dict(model.state_dict())
        tuned.layers[1].self_attn[part].weight += 0.01
        with pytest.raises(BadInput, match="other weights"):
            back.check(tuned)
    with pytest.raises(BadInput, match="other weights, settings"):
        T.decode(T.Llama({**model.config, "rope_theta": 1e4}), IDS[383:], back, 8)
    raw, damaged = path.read_bytes(), tmp_path / "d.pt"
    for content in (raw[:5000], b"", raw[:-100], {}, {"meta": {}, "layers": [(IDS[:, None], IDS[:3, None])]}):
        damaged.write_bytes(content) if isinstance(content, bytes) else torch.save(content, damaged)
        with pytest.raises(BadInput, match="cannot be opened as a saved context"):
            T.KVStore.load(damaged)
    monkeypatch.setattr(torch, "save", lambda _, new: new.write_text("half") and IDS.view(7))  # RuntimeError: disk full
    with pytest.raises(OSError, match="cannot write .*Free space"):
        store.save(tmp_path / "e.pt")
    assert sorted(tmp_path.iterdir()) == [path, damaged] and path.read_bytes() == raw


def test_tiny_llama_dense_in_chunks():
    model, store = tiny(), tiny_store(tiny())
    close(model(IDS[None])[0, 383:], EXPECTED["full_logits"].double(), atol=1e-4, rtol=0)
    close(store.layers[2][1], EXPECTED["cache_v_l2"].double(), atol=2e-3, rtol=1e-3)  # a float16 copy
    for how in ({"chunk": 50}, {"chunk": 100}, {"chunk": 1}):
        for a, b in zip(tiny_store(model, **how).layers, store.layers, strict=True):
            close(a, b)


@pytest.mark.parametrize("k", (1, 8, 38, 383))
def test_tiny_llama_topk(k):
    model, store, suffix = tiny(), tiny_store(tiny()), {}
    logits = T.decode(model, IDS[383:], store, k)
    close(logits, EXPECTED[f"topk64_logits_k{k}"].double(), atol=1e-6, rtol=0)
    close(torch.cat([T.decode(model, i[None], store, [k] * 3, suffix) for i in IDS[383:]]), logits)  # a step at a time
    assert store.n == 383 and len(suffix) == 3 and suffix[2][0].shape[1] == 17
    assert k == 383 or (logits - EXPECTED["full_logits"]).abs().max() > 0.05
    assert k == 383 or (T.decode(model, IDS[383:], store, [k, k, k + 9]) - logits).abs().max() > 1e-3


def test_generate_long_questions_and_limits():
    model, store = tiny(), tiny_store(tiny(), 59)
    new = T.generate(model, IDS[59:60], "dense", 8, store)
    assert torch.equal(model(torch.cat([IDS[:60], new])[None])[0, 59:-1].argmax(-1), new)  # the plain model's choice
    assert T.generate(model, IDS[59:60], "dense", 8, store, stop={int(new[2])}).tolist() == new[:3].tolist()
    close(T.decode(model, IDS[59:400], store, 1.0), model(IDS[None])[0, 59:])  # 64 tokens at a time
    assert T.generate(model, IDS[:1], 5, 3, tiny_store(model, 0))[0] == model(IDS[None, :1])[0, -1].argmax()
    with pytest.raises(BadInput, match="2 budgets for 3 layers"):
        T.decode(model, IDS[:3], store, [1, 2])
    for act in (lambda: T.prefill(model, IDS.repeat(3), T.KVStore()), lambda: T.decode(model, IDS.repeat(3), store, 4)):
        with pytest.raises(BadInput, match="exceed the model's max_position_embeddings 1024"):
            act()
    assert [T.resolve_k(k, 2048) for k in ("8", 0.02, "0.02", "dense", 5000, 1e-9)] == [8, 41, 41, 2048, 2048, 1]
    for layer in range(3):
        store.put(layer, *(x * math.nan for x in store.layers[layer]))
    with pytest.raises(BadInput, match="NaN"):
        T.generate(model, IDS[:3], 5, 2, store)


def test_toy_rows():
    for task, counts in (("single", [1] * 8), ("multivalue", [1] * 32), ("counting", [2] * 24 + [6] * 8)):
        ids, names, right = T.toy_rows(task, 300, 4, torch.Generator().manual_seed(0))
        assert (right.sum(-1) == (4 if task == "multivalue" else 1)).all() and right.shape == (4, 8, 16)
        for row, name, good in zip(ids.tolist(), names, right, strict=True):
            planted = {i: row[:300].count(i) for i in row[:300] if i < T.QUERY}
            assert sorted(planted.values()) == counts and len({i // 16 for i in planted}) == 8
            for query, answer, own, ok in zip(row[300::2], row[301::2], name.tolist(), good, strict=True):
                assert sorted(own) == [16 * (query - T.QUERY) + v for v in range(16)] and answer == own[0]
                assert torch.equal((often := torch.tensor([planted.get(i, 0) for i in own])) == often.max(), ok)


@pytest.mark.parametrize("wrong", (
    {}, {"2 %": 0.8}, {"2 %": 0.2}, {"first+recent 2 %": 0.5}, {"random 2 %": 0.5}, {"dense": 1.0},
    {"dense": 0.2, "2 %": 0.2, "first+recent 2 %": 0.0, "random 2 %": 0.0}, {"real": 0.9}, {"real": 0.0},
))  # fmt: skip
def test_the_verdict_can_fail(wrong, tmp_path, monkeypatch):
    right = {"dense": 0.9, "k = 1": 0.5, "k = 8": 0.6, "2 %": 0.9, "first+recent 2 %": 0.2, "random 2 %": 0.2}
    monkeypatch.setattr(T, "memory", lambda n: {"keys": n, "dense": 4, "handed": 1, "peak": 2})
    monkeypatch.setattr(T, "train_toy", lambda *_: None)
    monkeypatch.setattr(T.report, "picture", lambda *_, **how: "")
    monkeypatch.setattr(T, "score_tasks", lambda *_: {"single": [1.0, 0.0, 1.0, 1.0, wrong.get("real", 1.0)]})
    seen = lambda m, c, task, n, count, columns, w: [(right | (wrong if n == 8192 else {}))[x] for x in columns]
    monkeypatch.setattr(T, "toy_accuracy", seen)
    T.main(T.Config(out=str(tmp_path), device="cpu"))
    claim = json.loads((tmp_path / "claim.json").read_text())
    assert claim["holds"] == (not wrong) and "2 % of the rows keep" in claim["here"]


def test_the_demo_runs_and_a_model_that_retrieves_nothing_proves_nothing(tmp_path, capsys, monkeypatch):
    short = lambda m, c, task, n, count, *rest, real=T.toy_accuracy: real(m, c, task, 512, 4, *rest)
    monkeypatch.setattr(T, "toy_accuracy", short)
    T.main(T.Config(quick=True, steps=(20, 1), out=str(tmp_path), device="cpu"))
    said, lines = capsys.readouterr().out, metrics(tmp_path)
    assert "quick: no verdict" in said and "first+recent 2 %" in said and not (tmp_path / "claim.json").exists()
    found = {(x["task"], 2048): [x[c] for c in (*T.EXACT, *T.BASELINES)] for x in lines if "task" in x}
    assert len(found) == 3 and lines[-1]["handed"] < lines[-1]["dense"] and not T.judge(found, [])[1]


@pytest.mark.parametrize("task", T.ROOM)
def test_ruler(task):
    prompt, answers = T.ruler(task, 40_000, 1)
    assert (prompt, answers) == T.ruler(task, 40_000, 1) != T.ruler(task, 40_000, 2)
    assert 0.9 * 40_000 < len(prompt.encode()) + T.ROOM[task] <= 40_000 and all(a in prompt for a in answers)
    assert len(answers) == {"multivalue": 4, "vt": 5, "cwe": 10}.get(task, 1)
    words = prompt.split("\n")[1].split()
    counts = sorted(words.count(w) for w in set(words))
    assert task != "cwe" or counts[-10:] == [words.count(answers[0])] * 10 > counts[-11:-1]
    assert prompt.count("Please note that") == {"multikey": 4, "multivalue": 4, "vt": 0, "cwe": 0}.get(task, 1)


def model_folder(folder: Path, bos="<s>", extra=(), template=None) -> Path:
    """A tiny model whose tokenizer knows bytes and puts BOS in front."""
    tk, save = pytest.importorskip("tokenizers"), pytest.importorskip("safetensors.torch").save_file
    folder.mkdir()
    letters = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<unk>", bos, "</s>", *extra, *letters])}
    made = tk.Tokenizer(tk.models.BPE(vocab, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = tk.pre_tokenizers.ByteLevel(add_prefix_space=False), tk.decoders.ByteLevel()
    made.add_special_tokens([bos, "</s>", *extra])
    made.post_processor = tk.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    config = T.TOY | {"model_type": "llama", "vocab_size": len(vocab), "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1e4, "eos_token_id": 2}))
    torch.manual_seed(0)
    save(T.Llama(config).state_dict(), str(folder / "model.safetensors"))
    return folder


def test_prompts_are_the_models_own(tmp_path):
    chat = lambda name, **how: T.Chat(T.Config("eval", model=str(model_folder(tmp_path / name, **how))), W.device)
    special = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
    base = chat("base", bos="<|begin_of_text|>", extra=special)
    assert base.tail == "" and base.encode("hi")[0] == 1 and 1 not in base.encode("hi", first=False)
    llama3 = chat("l3", bos="<|begin_of_text|>", extra=special, template="{{ '<|start_header_id|>' }}")
    assert llama3.encode(llama3.head + "hi" + llama3.tail).tolist().count(1) == 1 and llama3.stop == {2, 3, 6}
    with pytest.raises(BadInput, match="chat template .* is unknown here"):
        chat("inst", template="[INST]")


def test_generate_from_a_document_and_from_its_saved_context(tmp_path, capsys):
    folder, document = model_folder(tmp_path / "m"), tmp_path / "doc.txt"
    document.write_text("some text to read, " * 9)
    argv = f"topk_attention.py generate --model {folder} --prompt question? --k 9 --new-tokens 12 --device cpu".split()
    run = lambda *more: (T.main(cli.parse(T.Config, [*argv[1:], *map(str, more)])), capsys.readouterr().out)[1]
    read, load = ("--document", document), ("--load-context", tmp_path / "c.pt")
    plain, said = run(*read), run(*read, "--save-context", tmp_path / "c.pt")
    assert said == plain == run(*load) == run(*load, *read) and "9 of 172 rows" in said and "9 of 9 rows" in run()
    for text, words in ((b"another text", "is of another text than"), (b"\xff\xfe", "is not UTF-8")):
        document.write_bytes(text)
        with pytest.raises(BadInput, match=words):
            run(*load, *read)


def test_eval_resumes_where_it_was_killed(tmp_path):
    folder, whole, part = model_folder(tmp_path / "m"), tmp_path / "whole", tmp_path
    common = {"mode": "eval", "model": str(folder), "context": 700, "ks": ("4",), "tasks": ("single", "vt")}
    run = lambda out, samples=2, **how: T.main(T.Config(**common, out=str(out), samples=samples, device="cpu", **how))
    run(whole)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (part / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])  # the last line was cut
    for _ in range(2):
        run(part, resume=True)
        assert metrics(part) == metrics(whole) and len(metrics(whole)) == 8
        T.report.Run(part, T.Config(), W)  # a demo in the same folder takes nothing away
    with pytest.raises(BadInput, match="--dtype float32"):
        run(part, resume=True, dtype="bfloat16")


@pytest.mark.weights
def test_smollm2_and_its_needle(tmp_path, monkeypatch):
    chat = T.Chat(T.Config("eval"), W.device)
    assert chat.encode("Hello world 123").tolist() == [19556, 905, 216, 33, 34, 35]
    top = chat.model(chat.encode("The capital of France is")[None])[0, -1].topk(5).indices
    assert top.tolist() == [7042, 260, 4528, 2250, 1315] and chat.head == "<|im_start|>user\n"
    monkeypatch.setattr(T, "Chat", lambda *_: chat)
    T.main(T.Config("eval", context=200, ks=("0.05",), samples=1, out=str(tmp_path), device="cpu"))
    assert [x["score"] for x in metrics(tmp_path)] == [1.0, 1.0]


def sharded(_, size, folder):
    pairs = [dist.new_group([i, i + 1]) for i in range(0, size, 2)]
    for group in (pairs[dist.get_rank() // 2], dist.group.WORLD):
        rank, n = dist.get_rank(group), dist.get_world_size(group)
        for seed, (N, M, top) in enumerate(((101, 3, 9), (40, 1, 30), (3, 2, 2), (64, 0, 64), (0, 2, 5))):
            q, k, v, ks, vs = problem(Hq=4, Hk=2, rows=min(2, max(M, 1)), N=N, M=M, seed=seed)
            k[:] = k[:, :1] if seed == 3 else k  # all rows tie
            own = slice(N * rank * rank // n**2, N * (rank + 1) ** 2 // n**2)  # uneven; a rank may hold nothing
            out = T.sharded_topk_attention(q, k[:, own], v[:, own], top, *([ks, vs] if M else []), group=group)
            close(out, T.topk_attention(q, k, v, top, *([ks, vs] if M else [])))
            every = [torch.empty_like(out) for _ in range(n)]
            dist.all_gather(every, out, group=group)
            assert all(torch.equal(every[0], x) for x in every)
        torch.manual_seed(0)
        model = T.Llama(T.TOY).requires_grad_(False)
        worst = lambda q, k, top: T.search(-q, k, top)  # another way to choose is kept over processes
        store, whole = (T.prefill(model, IDS[:200], T.KVStore(choose=worst, group=g)) for g in (group, None))
        assert store.n == 200 and store.nbytes * n == whole.nbytes
        close(T.decode(model, IDS[200:210], store, 7), T.decode(model, IDS[200:210], whole, 7), atol=1e-4, rtol=1e-4)
    columns = {"dense": (1.0, T.search), "k": (9, T.search), "random": (9, T.random_rows)}
    get = lambda w: T.toy_accuracy(model, T.Config(), "counting", 100, 5, columns, w)
    assert get(cluster.World(rank, size, W.device)) == pytest.approx([x / size for x in get(W)])  # get(W): on each rank
    cfg, said = T.Config("generate", model=folder, document=f"{folder}/config.json", prompt="?", new_tokens=9), []
    cluster.World.print = lambda w, *words: said.append(words[0].split("(")[0])
    for w in (cluster.World(rank, size, W.device), W):  # rows in slices, and in one process
        T.generate_text(cfg, w)
    assert said[:2] == said[2:] and "9 tokens, each from 64 of" in said[1]


@pytest.mark.slow
def test_two_and_four_ranks_give_the_same_as_one(tmp_path):
    run_ranks(sharded, 4, tmp_path, str(model_folder(tmp_path / "m")))


def test_bench_runs(tmp_path, capsys):
    T.main(T.Config("bench", keys=12_000, out=str(tmp_path), device="cpu"))
    rows = [[x.strip() for x in line.split("  ") if x] for line in capsys.readouterr().out.splitlines()[3:]]
    recall, handed = ({row[0]: float(row[i]) for row in rows} for i in (-2, -1))
    assert len(rows) == 5 and recall["top-k, keys on the cpu"] == 1 > recall["top-k, k-means lists as released"] > 0.5
    assert all((mb < 10) == name.startswith("top-k") for name, mb in handed.items())


@pytest.mark.parametrize("line,words", (
    ("generate --prompt x --k 2.5", "k must be an int"), ("eval --ks 0.02 x", "got 'x'"), ("demo --k 8", "not read"),
    ("demo --steps 5", "two counts"), ("eval --samples 0", "at least 1"),
    ("eval --tasks qa", "there are single, multi"), ("generate", "pass --prompt"), ("bench --keys 9", "at least 64"),
    ("generate --prompt x --document none", "no such file"), ("generate --prompt x --save-context .", "a new file"),
    ("generate --prompt x --save-context none/c.pt", "in a folder that is there"),
))  # fmt: skip
def test_what_is_refused_k_anything_runs(line, words, capsys):
    with pytest.raises(SystemExit):
        cli.parse(T.Config, line.split())
    assert words in capsys.readouterr().err
