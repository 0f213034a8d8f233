"""CompressedEmbedding: row gather against the decoded matrix, tied readers, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn

from calora_ext import CaloraError, CompressedEmbedding, WeightFormat
from calora_ext.embedding import TiedEmbedding, TiedLinear

FORMATS = [
    WeightFormat("int4", 64), WeightFormat("int4", -1), WeightFormat("int4", 32, symmetric=False), WeightFormat("int8"), WeightFormat("bf16"),
    WeightFormat("nf4", 64), WeightFormat("nf4", -1),
]  # fmt: skip
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


@each_format
@pytest.mark.parametrize("shape", [(1, 1), (97, 70), (64, 128)], ids=str)
def test_look_up_equals_rows_of_the_decoded_matrix(fmt, shape):
    torch.manual_seed(0)
    table = CompressedEmbedding.from_embedding(nn.Embedding(*shape), fmt)
    ids = torch.randint(0, shape[0], (3, 5))
    assert torch.equal(table(ids), table.decode()[ids])
    assert table(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, shape[1])


def test_dtype_follows_and_ids_are_checked():
    table = CompressedEmbedding.from_embedding(nn.Embedding(40, 32, padding_idx=0), WeightFormat("int8")).to(torch.bfloat16)
    assert table(torch.tensor([1])).dtype == table.weight.dtype == torch.bfloat16 and table.packed.dtype == torch.uint8
    for bad in (40, -1, 63):
        with pytest.raises(IndexError, match=r"0\.\.39"):
            table(torch.tensor([bad]))
    with pytest.raises(CaloraError, match="Linear"):
        CompressedEmbedding.from_embedding(nn.Linear(3, 4), WeightFormat("int8"))


@each_format
def test_tied_modules_read_one_matrix(fmt):
    torch.manual_seed(1)
    table = CompressedEmbedding.from_embedding(nn.Embedding(50, 64), fmt)
    model = nn.ModuleDict({"embed": table, "again": TiedEmbedding(table), "head": TiedLinear(table)})
    assert [name for name in model.state_dict()] == [f"embed.{name}" for name in table.packed_tensors()]
    x = torch.randn(4, 64)
    model["head"].activations = "exact"
    with torch.no_grad():
        torch.testing.assert_close(model["head"](x), x @ table.decode().t(), rtol=1e-4, atol=1e-4)
    assert torch.equal(model["again"](torch.arange(50)), table.decode())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin["head"].packed is twin["embed"].packed and twin["embed"].packed is not table.packed
        assert torch.equal(twin["head"].weight + 0, table.decode())
