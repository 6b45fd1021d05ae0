import io

import gguf
import pytest

from jaxtune.data import gguf_tokenizer, load_tokenizer
from jaxtune.errors import WeightError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_byte_level(path, pre="gpt-2", model="gpt2", add_bos=None):
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = SPECIAL + sorted(ByteLevel.alphabet()) + ["12", "123", "Ġa", "ab", "<think>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 4) + [4])
    writer.add_token_merges(["1 2", "12 3", "Ġ a", "a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["123", "4", "Ġa", "<think>"]),
        ("default", ["123", "4", "Ġa", "<think>"]),
        ("llama-bpe", ["123", "4", "Ġa", "<think>"]),
        ("smollm", ["1", "2", "3", "4", "Ġa", "<think>"]),
        ("qwen2", ["1", "2", "3", "4", "Ġa", "<think>"]),
    ],
)
def test_the_pre_tokenizer_is_honoured(tmp_path, pre, pieces):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "m.gguf", pre, add_bos=False))
    assert tokenizer.tokenize("1234 a<think>") == pieces
    assert tokenizer("ab<|im_end|>ü").input_ids[1] == 2
    assert tokenizer.decode(tokenizer("ab 12 ü\n").input_ids) == "ab 12 ü\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer.chat_template == "{{ messages }}" and tokenizer.model_max_length == 256


def test_bos(tmp_path):
    def first(**kwargs):
        path = write_byte_level(tmp_path / "m.gguf", **kwargs)
        return load_tokenizer(path)("ab").input_ids[0] == 0

    assert first(add_bos=True) and not first(add_bos=False)
    assert not first() and first(pre="llama-bpe")


def test_unknown_kinds_are_refused_with_what_is_supported(tmp_path):
    path = write_byte_level(tmp_path / "m.gguf", pre="deepseek-llm")
    with pytest.raises(WeightError, match="pre='deepseek-llm' is not supported .*smollm"):
        load_tokenizer(path)
    path = write_byte_level(tmp_path / "m.gguf", model="bert")
    with pytest.raises(WeightError, match="model='bert' is not supported .*gpt2, llama"):
        load_tokenizer(path)


def test_damaged_files(tmp_path):
    path = tmp_path / "m.gguf"
    write_byte_level(path)
    content = path.read_bytes()
    for cut in (0, 3, 20, 200, len(content) // 2):
        path.write_bytes(content[:cut])
        with pytest.raises(WeightError, match="m.gguf"):
            load_tokenizer(str(path))
    path.write_bytes(b"JUNK" + content[4:])
    with pytest.raises(WeightError, match="not a GGUF file"):
        load_tokenizer(str(path))
    damaged = content.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.murges")
    assert damaged != content
    path.write_bytes(damaged)
    with pytest.raises(WeightError, match="its tokenizer is damaged .KeyError"):
        load_tokenizer(str(path))
    huge = content[:16] + b"\xff" * 7 + b"\x7f" + content[24:]
    path.write_bytes(huge)
    with pytest.raises(WeightError, match="is damaged: .* keys"):
        load_tokenizer(str(path))


def test_sentencepiece_ids_equal_the_original(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    words = "the cat sat on a mat with the hat that the rat had and ran as fast as it can".split()
    lines = [" ".join(words[i : i + 4] + words[j : j + 2]) for i in range(16) for j in range(16)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = spm.SentencePieceProcessor(model_proto=model.getvalue())
    size = theirs.vocab_size()
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
        for i in range(size)
    ]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([theirs.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([theirs.get_score(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(theirs.bos_id())
    writer.add_eos_token_id(theirs.eos_id())
    writer.add_unk_token_id(theirs.unk_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = load_tokenizer(str(tmp_path / "m.gguf"))
    for text in [*lines[::7], "that  hat", " lead", "Ünknown 日本", "catsat\nmat", "a"]:
        ids = ours(text).input_ids
        assert ids == [theirs.bos_id(), *theirs.encode(text)], text
        assert ours.decode(ids, skip_special_tokens=True) == text


def test_smollm_file(smollm, smollm_path):
    assert smollm.tokenize("in 2024!") == ["in", "Ġ", "2", "0", "2", "4", "!"]
    assert smollm("").input_ids == []
    assert (smollm.bos_token_id, smollm.eos_token_id, smollm.pad_token_id) == (1, 2, 2)
    assert len(smollm) == 49152 and "named SmolLM" in smollm.chat_template
    loaded = gguf_tokenizer.load(smollm_path)
    assert loaded.context_length == 8192


def test_a_saved_tokenizer_loads_equal(smollm, tmp_path):
    smollm.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    text = "Hello 1234  wörld\n\n\tx<|im_end|> 日本 don't I'LL"
    assert again(text).input_ids == smollm(text).input_ids
    assert again.chat_template == smollm.chat_template
