"""lm-evaluation-harness' own tasks, requests and scores, on task files that the test writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlens as ml
from memlens.errors import ModelLoadError, OptionError, SiteError, SourceNotFoundError
from memlens.instruments.tasks import lm_eval as lm_eval_tasks
from memlens.instruments.tasks.tasks import Question
from memlens.models.zoo import zoo_path
from memlens.organisms.corpus.corpus import load_tokenizer
from memlens.organisms.local_tasks import local_tasks
from memlens.sweeps.run import measure
from tests.tiny import D_VOCAB, tiny_huggingface_model, tiny_tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

MULTIPLE_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "choices"
doc_to_target: "gold"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
CONTEXTS_DIFFER = """
output_type: multiple_choice
doc_to_text: "gold"
doc_to_choice: "contexts"
doc_to_target: "ending"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GENERATED = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
"""


def write_task(folder: Path, name: str, body: str, docs: list[dict[str, Any]]) -> None:
    """Write a task and its data as lm-eval reads them."""
    data = folder / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, docs)))
    head = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(head)}\ntest_split: test\n{body}"
    )


def words(rng: np.random.Generator, n: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, D_VOCAB - 1, n))


@pytest.fixture(scope="module")
def tiny_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("tiny-tasks"), np.random.default_rng(0)
    mixed = [
        {
            "context": words(rng, rng.integers(1, 9)),
            "choices": [words(rng, rng.integers(1, 4)) for _ in range(3)],
            "gold": int(rng.integers(3)),
        }
        for _ in range(24)
    ]
    write_task(folder, "tiny_mc", MULTIPLE_CHOICE, mixed)
    pairs = [
        {"contexts": [words(rng, 3), words(rng, 5)], "ending": words(rng, 2), "gold": int(rng.integers(2))}
        for _ in range(12)
    ]
    write_task(folder, "tiny_contexts", CONTEXTS_DIFFER, pairs)
    write_task(folder, "tiny_last", LAST_WORD, [{"text": words(rng, 6)} for _ in range(12)])
    write_task(folder, "tiny_generated", GENERATED, [{"text": "w1 w2"}])
    return folder


@pytest.fixture(scope="module")
def zoo_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real words: contexts that end in a space, or are empty, choices of many lengths, and right guesses."""
    folder = tmp_path_factory.mktemp("zoo-tasks")
    tails = ["the old lamp", "a", "six lamps of copper", "Tarn."]
    contexts = ["Mara found ", "Viggo was in", "", "In spring Otto came to  ", "Noor sells the lamp.\n"]
    mixed = [{"context": c, "choices": tails, "gold": i % 4} for i, c in enumerate(contexts)]
    write_task(folder, "zoo_mc", MULTIPLE_CHOICE, mixed)
    words = load_tokenizer(zoo_path("pythia-s"))
    passages = local_tasks("zoo", words, names=["last_word"], n=20)
    texts = [{"text": words.decode(row)} for row in passages[0].requests.rows()]
    write_task(folder, "zoo_last", LAST_WORD, [*texts, {"text": "Every spring Mara met kettles"}])
    return folder


def manager_of(task_folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(task_folder), include_defaults=False)


def harness(
    folder: Path, task_folder: Path, names: list[str], requests: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """lm-eval's own log-likelihoods of all requests in order, and its scores."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=5)
    manager = manager_of(task_folder)
    found = simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    samples = [
        sample for name in names for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"])
    ]
    logprobs = [float(response[0][0]) for sample in samples for response in sample["resps"]]
    assert len(logprobs) == requests
    return np.array(logprobs), found["results"]


def same_as_harness(model: Any, folder: Path, task_folder: Path, names: list[str]) -> ml.Result:
    tasks = ml.tasks.from_lm_eval(names, model, task_manager=manager_of(task_folder))
    logprobs, scores = harness(folder, task_folder, names, sum(len(task.requests) for task in tasks))
    ours = np.concatenate(
        [
            measure(model, task.requests, ["target_logprob"])["target_logprob"]
            * task.requests.n_targets.numpy()
            for task in tasks
        ]
    )
    np.testing.assert_allclose(ours, logprobs, atol=1e-4)
    result = ml.evaluate_tasks(model, tasks)
    for name in names:
        of_task = result.data.isel(sequence=np.flatnonzero(result["task"].values == name))
        assert float(of_task["accuracy"].mean()) == pytest.approx(scores[name]["acc,none"])
        if "acc_norm,none" in scores[name]:
            assert float(of_task["accuracy_norm"].mean()) == pytest.approx(scores[name]["acc_norm,none"])
    return result


def test_requests_and_scores_are_those_of_hflm(
    tiny_model: Callable[..., Any], tiny_folder: Callable[[str], Path], tiny_tasks: Path
) -> None:
    names = ["tiny_mc", "tiny_contexts", "tiny_last"]
    result = same_as_harness(tiny_model("gpt_neox"), tiny_folder("gpt_neox"), tiny_tasks, names)
    assert result.data.sizes["sequence"] == 24 + 12 + 12
    chosen = result["chance"].values[[0, 24, 36]]
    np.testing.assert_allclose(chosen, [1 / 3, 1 / 2, 0])


def test_requests_and_scores_are_those_of_hflm_on_real_words(zoo_tasks: Path) -> None:
    folder = zoo_path("pythia-s")
    model = ml.load_model("zoo/pythia-s")
    result = same_as_harness(model, folder, zoo_tasks, ["zoo_mc", "zoo_last"])
    assert result["accuracy"].values[5:-1].mean() > 0.5  # the name of a story's hero
    assert result["accuracy"].values[-1] == 0  # what no story says


def test_a_bypass_held_over_hflm_gives_the_same_log_likelihoods(
    tiny_model: Callable[..., Any], tiny_tasks: Path
) -> None:
    """Hooks on the bridge act inside the Hugging Face model: lm-eval itself can measure an edited model."""
    from lm_eval.models.huggingface import HFLM

    model = tiny_model("gpt_neox", "bridge")
    (task,) = ml.tasks.from_lm_eval(["tiny_mc"], model, task_manager=manager_of(tiny_tasks))
    requests = _instances(tiny_tasks, "tiny_mc")
    lm = HFLM(pretrained=model.original_model, tokenizer=model.tokenizer, batch_size=7, add_bos_token=False)
    edits = ml.edits.attention_bypasses(model, layers=[1])
    with ml.bypassed(model, 1):
        theirs = np.array([logprob for logprob, _ in lm.loglikelihood(requests, disable_tqdm=True)])
    swept = ml.sweep(model, task.requests, edits, ["target_logprob"], progress=False)
    ours = swept["target_logprob"].values[:, 0] * task.requests.n_targets.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def _instances(folder: Path, name: str) -> list[Any]:
    task = manager_of(folder).load([name])["tasks"][name]
    task.build_all_requests()
    return task.instances


def test_limit_groups_and_ready_task_objects(tiny_model: Callable[..., Any], tiny_tasks: Path) -> None:
    ready = manager_of(tiny_tasks).load(["tiny_mc"])["tasks"]["tiny_mc"]
    (task,) = ml.tasks.from_lm_eval([ready], tiny_model("gpt_neox"), limit=5, groups={"tiny_mc": "language"})
    assert (len(task), len(task.requests), task.group) == (5, 15, "language")


def test_few_shots_stand_in_front(tiny_model: Callable[..., Any], tiny_tasks: Path) -> None:
    model = tiny_model("gpt_neox")
    (plain,) = ml.tasks.from_lm_eval("tiny_mc", model, task_manager=manager_of(tiny_tasks), limit=3)
    (shots,) = ml.tasks.from_lm_eval(
        "tiny_mc", model, task_manager=manager_of(tiny_tasks), limit=3, num_fewshot=1
    )
    for short, long in zip(plain.requests.rows(), shots.requests.rows(), strict=True):
        assert len(long) > len(short)
        assert long[-len(short) :] == short


def test_what_cannot_be_taken_is_said(
    tiny_model: Callable[..., Any], tiny_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt_neox")
    with pytest.raises(OptionError, match="generate_until"):
        ml.tasks.from_lm_eval("tiny_generated", model, task_manager=manager_of(tiny_tasks))
    with pytest.raises(OptionError, match=r"no task 'tiny_mcc'.*tiny_mc"):
        ml.tasks.from_lm_eval("tiny_mcc", model, task_manager=manager_of(tiny_tasks))
    with pytest.raises(OptionError, match="limit=0"):
        ml.tasks.from_lm_eval("tiny_mc", model, task_manager=manager_of(tiny_tasks), limit=0)
    write_task(tmp_path, "lost", MULTIPLE_CHOICE, [{"context": "w1", "choices": ["w2"], "gold": 0}])
    (tmp_path / "lost.json").unlink()
    with pytest.raises(SourceNotFoundError, match="task 'lost' or its data cannot be read"):
        ml.tasks.from_lm_eval("lost", model, task_manager=manager_of(tmp_path))
    right = {"context": "w1", "choices": ["w2", "w3"], "gold": 1}
    write_task(tmp_path, "wrong", MULTIPLE_CHOICE, [right, {**right, "gold": 7}])
    with pytest.raises(OptionError, match="wrong-1 of lm-eval has the answer 7"):
        ml.tasks.from_lm_eval("wrong", model, task_manager=manager_of(tmp_path))
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"memlens\[eval\]"):
        ml.tasks.from_lm_eval("tiny_mc", model)


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


TEXTS = ("Mara was old and the kettle sang", "The old boat was", "every spring " * 50)


def test_as_lm_eval_is_hflm_on_the_model_as_it_is() -> None:
    from lm_eval.models.huggingface import HFLM

    folder = zoo_path("pythia-s")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    theirs = HFLM(
        pretrained=plain, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=3, add_bos_token=False,
    )  # fmt: skip
    ours = ml.tasks.as_lm_eval(ml.load_model("zoo/pythia-s"), prepend_bos=False, progress=False)
    pairs = [request(text[: len(text) // 2], text[len(text) // 2 :]) for text in TEXTS[:2]]
    pairs.append(request("", "Mara was"))
    for (logprob, greedy), (value, same) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert logprob == pytest.approx(value, abs=1e-4)
        assert greedy == same
    texts = [request(text) for text in TEXTS]
    assert len(ours.encoder.prompt(TEXTS[-1])) > ours.max_length  # more than one window
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), rolling, rtol=1e-5)
    asked = [request(text, {"until": [".", "\n"], "max_gen_toks": 12}) for text in TEXTS]
    asked.append(request(TEXTS[0], {"until": [], "max_gen_toks": 3, "do_sample": False}))
    generated = ours.generate_until(asked)
    assert generated == theirs.generate_until(asked, disable_tqdm=True)
    assert len(set(map(len, generated))) > 1


@pytest.mark.parametrize("bos", [False, True])
def test_requests_longer_than_the_context_equal_hflm(
    tiny_model: Callable[..., Any], tmp_path: Path, bos: bool
) -> None:
    from lm_eval.models.huggingface import HFLM

    model = tiny_model("gpt_neo")  # absolute positions: a token less of context changes every number
    tokenizer = tiny_tokenizer()
    theirs = HFLM(
        pretrained=tiny_huggingface_model("gpt_neo"), tokenizer=tokenizer, batch_size=4, add_bos_token=bos
    )
    tokenizer.save_pretrained(tmp_path)
    theirs.tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=bos)
    assert theirs.max_length == model.cfg.n_ctx
    ours = ml.tasks.as_lm_eval(model, prepend_bos=bos, progress=False)
    rng = np.random.default_rng(1)
    lengths = [model.cfg.n_ctx + extra for extra in (-2, -1, 0, 1, 30)]
    pairs = [(words(rng, n), " " + words(rng, k)) for n in lengths for k in (1, 2, 5)]
    pairs += [("w1", " " + words(rng, model.cfg.n_ctx)), ("", "w3 w4"), *[(" ", "w3 w4")] * bos]
    asked = [request(*pair) for pair in pairs]
    expected = [value for value, _ in theirs.loglikelihood(asked, disable_tqdm=True)]
    np.testing.assert_allclose([value for value, _ in ours.loglikelihood(asked)], expected, rtol=1e-4)
    texts = [request(text) for text in ("", "w5", *[words(rng, n) for n in (*lengths, 3 * lengths[0])])]
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), rolling, rtol=1e-4)
    questions = [Question((given,), (scored,), (0,), (1,), str(i)) for i, (given, scored) in enumerate(pairs)]
    task = ml.tasks.ChoiceTask.from_questions(questions, ours.encoder, name="long", group="other")
    found = ml.evaluate_tasks(model, [task], ml.edits.attention_bypasses(model, layers=[0]), progress=False)
    np.testing.assert_allclose(found["gold_logprob_baseline"].values, expected, rtol=1e-4)
    with ml.bypassed(model, [0]):
        bypassed = [value for value, _ in ours.loglikelihood(asked)]
    np.testing.assert_allclose(found["gold_logprob"].values[:, 0], bypassed, rtol=1e-4)


def test_as_lm_eval_holds_its_interventions(tiny_model: Callable[..., Any], tiny_tasks: Path) -> None:
    from lm_eval import simple_evaluate

    model = tiny_model("gpt_neox")
    (edit,) = ml.edits.attention_bypasses(model, layers=[[0, 1]])
    lm = ml.tasks.as_lm_eval(model, edit, progress=False)
    found = simple_evaluate(lm, tasks=["tiny_mc"], task_manager=manager_of(tiny_tasks), bootstrap_iters=0)
    (task,) = ml.tasks.from_lm_eval(["tiny_mc"], model, task_manager=manager_of(tiny_tasks))
    swept = ml.evaluate_tasks(model, [task], [edit], progress=False)
    assert found["results"]["tiny_mc"]["acc,none"] == pytest.approx(float(swept["accuracy"].mean()))
    logprobs = [
        r[0][0] for s in sorted(found["samples"]["tiny_mc"], key=lambda s: s["doc_id"]) for r in s["resps"]
    ]
    direct = ml.sweep(model, task.requests, [edit], ["target_logprob"], progress=False)
    total = direct["target_logprob"].values[:, 0] * task.requests.n_targets.numpy()
    np.testing.assert_allclose(logprobs, total, atol=1e-4)
    assert not np.allclose(total, direct["target_logprob_baseline"].values * task.requests.n_targets.numpy())
    assert lm.get_model_info()["interventions"] == [edit.name]
    generated = lm.generate_until([request("w5 w7 w2", {"until": [], "max_gen_toks": 4})])
    ids = torch.tensor([lm.encoder.prompt("w5 w7 w2")])
    with ml.bypassed(model, [0, 1]):
        whole = model.generate(ids, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    assert generated == [model.tokenizer.decode(whole[0, ids.shape[1] :])]


def test_as_lm_eval_refuses_what_it_cannot_do(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox")
    with pytest.raises(SiteError, match="hook_x"):
        ml.tasks.as_lm_eval(model, ml.Intervention("typo", [("blocks.0.attn.hook_x", lambda x, hook: x)]))
    lm = ml.tasks.as_lm_eval(model, progress=False)
    with pytest.raises(OptionError, match="do_sample"):
        lm.generate_until([request("a", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(OptionError, match="no room"):
        lm.generate_until([request("a", {"max_gen_toks": 10_000})])
