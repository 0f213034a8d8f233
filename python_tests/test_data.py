"""Reading data files and making batches of them."""

import csv
import gzip
import io
import json

import pytest
import torch
from adapt_helpers import make_tokenizer

from calora_ext import CaloraError
from calora_ext.io.batches import collate, sample_key, task_name, tokenize
from calora_ext.io.data import Record, labelled, read_records

SST2 = "sentence\tlabel\nit 's a \"charming journey . \t1\nunflinchingly bleak \t0\n"
MRPC = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t13\t14\t" The pie .\tA " pie .\n0\t15\t16\tHe said\tShe said\n'


@pytest.fixture(params=["", ".gz"])
def write(request, tmp_path):
    def write(name, text):
        path = tmp_path / (name + request.param)
        data = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(gzip.compress(data) if request.param else data)
        return path

    return write


def test_txt_is_one_text(write):
    assert read_records(write("a.txt", "one\ntwo\r\n\nthree")) == [Record("one\ntwo\n\nthree")]


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([{"text": "a b"}, {"text": "c"}], [Record("a b"), Record("c")]),
        ([{"prompt": "q", "completion": "a"}], [Record("q", completion="a")]),
        ([{"text": "a", "label": 1}, {"text": "b", "label": -1}], [Record("a", label=1), Record("b", label=-1)]),
        ([{"text": "a", "text_pair": "b", "label": "yes"}], [Record("a", pair="b", label="yes")]),
        ([{"question": "q", "sentence": "s", "label": True}], [Record("q", pair="s", label=1)]),
    ],
)
def test_jsonl(write, rows, want):
    assert read_records(write("a.jsonl", "\n".join(json.dumps(r) for r in rows) + "\n\n")) == want
    assert read_records(rows) == want


def test_jsonl_keeps_line_separators_of_unicode(write):
    assert read_records(write("a.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)))[0].text == "a\u2028b\x85c"


def test_glue_columns_are_the_default(write):
    assert read_records(write("sst.tsv", SST2)) == [
        Record("it 's a \"charming journey . ", label="1"),
        Record("unflinchingly bleak ", label="0"),
    ]
    got = read_records(write("mrpc.tsv", MRPC))
    rows = list(csv.DictReader(io.StringIO(MRPC.removeprefix("\ufeff")), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert got == [Record(r["#1 String"], pair=r["#2 String"], label=r["Quality"]) for r in rows] and len(got) == 2


def test_columns_by_name(write):
    path = write("mrpc.tsv", MRPC)
    assert read_records(path, text_column="#2 String")[1] == Record("She said", label="0")
    assert read_records(path, text_column="#1 String", pair_column="#1 ID", label_column="#2 ID")[0] == Record(
        '" The pie .', None, "13", "14"
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "x", "expected a name ending in"),
        ("a.txt", "", "holds no text"),
        ("a.txt", "  \n ", "holds no text"),
        ("a.txt", b"fine\n\xff\xfe", "line 2 is not UTF-8"),
        ("a.jsonl", "", "holds no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "is not a JSON object"),
        ("a.jsonl", '{"txt": "a"}', "no text column"),
        ("a.jsonl", '{"text": 5}', "is not a text"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"label": 1}', "line 2 has no text"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', "label"),
        ("a.tsv", "", "holds no|is empty"),
        ("a.tsv", "sentence\tlabel\nonly one field\n", "line 2 has 1 fields, the header has 2"),
        ("a.tsv", "sentence\tlabel\n", "holds no text"),
    ],
)
def test_bad_files_get_one_sentence(write, name, content, says):
    with pytest.raises(CaloraError, match=says) as raised:
        read_records(write(name, content))
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CaloraError, match="there is no file"):
        read_records(tmp_path / "none.txt")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-20])
    with pytest.raises(CaloraError, match="not a whole gzip file"):
        read_records(tmp_path / "cut.txt.gz")
    (tmp_path / "plain.txt.gz").write_text("not compressed")
    with pytest.raises(CaloraError, match="not a whole gzip file"):
        read_records(tmp_path / "plain.txt.gz")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CaloraError, match="cannot read"):
        read_records(tmp_path / "folder.txt")
    with pytest.raises(CaloraError, match="no column 'x'"):
        read_records([{"text": "a"}], label_column="x")
    with pytest.raises(CaloraError, match="row 2"):
        read_records([{"text": "a"}, "b"])
    with pytest.raises(CaloraError, match="got int"):
        read_records(3)


def test_labels():
    records = [Record("a", label="1"), Record("b", label=-1), Record("c", label="good"), Record("d", label=0)]
    kept, dropped = labelled(records, {"good": 1, "bad": 0}, 2)
    assert [r.label for r in kept] == [1, 1, 0] and dropped == 1
    for record, says in [
        (Record("a"), "no label"),
        (Record("a", label="x"), "'x'"),
        (Record("a", label=2), "2 classes"),
        (Record("a", label=-1), "negative"),
    ]:
        with pytest.raises(CaloraError, match=says):
            labelled([record], {"good": 1}, 2)


def test_packing_loses_only_the_tail():
    tokenizer = make_tokenizer()
    texts = ["the cat sat", "the dog ran on the mat"]
    samples, said = tokenize([Record(t) for t in texts], tokenizer, "causal-lm", 4)
    stream = [i for t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    assert torch.cat([s["input_ids"] for s in samples]).tolist() == stream[: len(stream) // 4 * 4]
    assert all(torch.equal(s["input_ids"], s["labels"]) and len(s["labels"]) == 4 for s in samples) and "3 blocks of 4" in said
    short, _ = tokenize([Record("the cat")], tokenizer, "causal-lm", 4)
    assert short[0]["input_ids"].tolist() == tokenizer("the cat")["input_ids"]  # a single text is not ended by eos


@pytest.mark.parametrize("end", ["", "</s>"])
def test_only_the_response_is_predicted(end):
    tokenizer = make_tokenizer(end)
    records = [Record("question ?", completion="yes ."), Record("a b c d e f g h", completion="no")]
    samples, said = tokenize(records, tokenizer, "causal-lm", 8)
    ids = ["<s>", "question", "?", "yes", ".", "</s>"]
    assert len(samples) == 1 and "1 dropped" in said
    assert tokenizer.convert_ids_to_tokens(samples[0]["input_ids"].tolist()) == ids
    assert samples[0]["labels"].tolist() == [-100] * 3 + samples[0]["input_ids"][3:].tolist()
    with pytest.raises(CaloraError, match="no sample is left"):
        tokenize(records[1:], tokenizer, "causal-lm", 8)


def test_seq2seq_and_classification_samples():
    tokenizer = make_tokenizer("</s>")
    (sample,), _ = tokenize([Record("question ?", completion="yes")], tokenizer, "seq2seq-lm", 16)
    assert sample["labels"].tolist() == tokenizer("yes")["input_ids"]
    samples, said = tokenize(
        [Record("a b c d", pair="e", label=1), Record("c", pair="d", label=-1)], tokenizer, "sequence-classification", 16, {}, 2
    )
    assert "1 dropped" in said and samples[0]["labels"].item() == 1
    assert samples[0]["input_ids"].tolist() == tokenizer("a b c d", "e")["input_ids"]
    for task, records in [
        ("seq2seq-lm", [Record("a")]),
        ("causal-lm", [Record("a", pair="b")]),
        ("sequence-classification", [Record("a")]),
    ]:
        with pytest.raises(CaloraError):
            tokenize(records, tokenizer, task, 16, {}, 2)


def test_collate_pads_and_masks():
    samples = [
        {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6])},
        {"input_ids": torch.tensor([7]), "labels": torch.tensor([7])},
    ]
    batch = collate(samples, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]] and batch["labels"].tolist() == [[5, 6], [7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert sample_key(samples[0]) != sample_key(samples[1]) and sample_key(samples[0]) == sample_key(
        dict(reversed(samples[0].items()))
    )


def test_task_names():
    assert [task_name(t) for t in ("CAUSAL_LM", "SEQ_CLS", "seq2seq-lm")] == [
        "causal-lm",
        "sequence-classification",
        "seq2seq-lm",
    ]
    with pytest.raises(CaloraError, match="not a task"):
        task_name("ner")
