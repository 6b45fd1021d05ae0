"""configs/pretrain.py: documents one after the other, each closed by EOS, all tokens trained."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxtune import config, data

ROOT = Path(__file__).resolve().parents[2]
TEXTS = (
    "To be, or not to be.\n\nThat is the question." * 3,
    "春眠不觉晓",
    "A third text.",
    "x" * 200,
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of two .txt files and a file of rows with texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in zip(("a.txt", "b.txt"), TEXTS[:2], strict=True):
        (folder / name).write_text(text, encoding="utf-8")
    rows = [json.dumps({"text": text}) for text in TEXTS[2:]]
    (folder / "c.jsonl").write_text("\n".join(rows))
    return folder


def parsed(texts: Path, *options: str):
    return config.parse_arguments(
        [
            f"--config={ROOT / 'configs' / 'pretrain.py'}",
            "--config.model.path=tiny:llama",
            f"--config.data.train={texts}",
            "--config.data.max_seq_len=32",
            "--config.data.shuffle=false",
            *options,
        ]
    )


def batches_of(tokenizer, cfg):
    found, _ = data.load(cfg.data, tokenizer, seed=0, vocab_size=259)
    assert isinstance(found, data.Dataset)
    return found, list(data.Loader(found, cfg.data, 1, 1, 0, (0,)).one_pass())


def test_rows_are_full_and_hold_every_token_of_every_document(byte_tokenizer, texts):
    found, batches = batches_of(byte_tokenizer, parsed(texts))
    documents = [byte_tokenizer(text).input_ids + [byte_tokenizer.eos_token_id] for text in TEXTS]
    assert [row.tokens.tolist() for row in found.rows] == documents
    length = sum(map(len, documents))
    assert found.stats.trained_tokens == length - len(TEXTS)
    shown = np.concatenate([batch.tokens[0] for batch in batches])
    assert shown[:length].tolist() == sum(documents, [])
    assert len(batches) == -(-length // 32)
    # Every token but the first of a piece is a target; pieces do not see each other.
    for batch in batches:
        begins = batch.positions[0] == 0
        is_text = batch.segment_ids[0] > 0
        assert batch.weights[0].tolist() == (is_text & ~begins).astype(float).tolist()
    assert max(int(batch.segment_ids.max()) for batch in batches) > 1


def test_documents_of_a_row_can_see_each_other(byte_tokenizer, texts):
    found, batches = batches_of(byte_tokenizer, parsed(texts, "--config.data.isolated=false"))
    begins = np.cumsum(found.rows.lengths) - found.rows.lengths
    for number, batch in enumerate(batches[:-1]):
        assert batch.positions[0].tolist() == list(range(32)) and (batch.segment_ids == 1).all()
        places = np.arange(32) + 32 * number
        untrained = (places % 32 == 0) | np.isin(places, begins)
        assert batch.weights[0].tolist() == (~untrained).astype(float).tolist()


@pytest.mark.slow
def test_a_run_lowers_the_loss_and_goes_on_exactly(texts, tmp_path):
    """Streamed, stopped after a save and started again: the losses of the uninterrupted run."""
    import jaxtune

    def run(name: str, steps: int) -> list[float]:
        cfg = parsed(
            texts,
            f"--config.train.output_dir={tmp_path / name}",
            f"--config.train.num_steps={steps}",
            "--config.train.gradient_accumulation_steps=2",
            "--config.data.streaming=true",
            "--config.optim.schedule=constant",
            "--config.optim.warmup_ratio=0",
            "--config.optim.learning_rate=0.01",
            "--config.log.plot=false",
            "--config.log.tensorboard=false",
        )
        jaxtune.train(cfg)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    whole = run("whole", 8)
    run("parts", 5)
    assert run("parts", 8) == whole and whole[-1] < whole[0]
    assert (tmp_path / "parts" / "merged").is_dir()
