"""BERT and ViT, small and random, and MiniLM as it was published: the same numbers as in transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from parity import beside

import moejax as mj

BERT = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 20,
}  # fmt: skip


def test_bert(tmp_path: Path) -> None:
    one = beside.make("BertModel", tmp_path / "a", **BERT)
    ids, kinds = beside.tokens(61), beside.tokens(2, seed=1)
    mask = np.ones(ids.shape, bool)
    mask[1, 8:] = False
    with torch.no_grad():
        theirs = one.theirs(
            torch.tensor(ids), torch.tensor(mask).long(), token_type_ids=torch.tensor(kinds), output_hidden_states=True
        )
    ctx = mj.Context(valid=jnp.asarray(mask))
    run = jax.jit(lambda v, x, t: one.model.apply(v, x, ctx, t, mutable=["pooled"]))
    ours, sown = run(one.found.variables, ids, kinds)
    where = torch.tensor(mask)
    assert beside.distance(np.asarray(ours)[mask], theirs.last_hidden_state[where]) < 1e-5
    assert beside.distance(sown["pooled"]["vector"], theirs.pooler_output) < 1e-5
    for given, hidden in zip(beside.blocks_of(one, ids, ctx, kinds), theirs.hidden_states[1:], strict=True):
        assert beside.distance(given[mask], hidden[where]) < 1e-5
    beside.back(one, tmp_path / "b")


def test_minilm_on_real_text() -> None:
    """Logits there are none: hidden states of every layer, and the embeddings of sentences."""
    folder = mj.pretrained.find("minilm-l6")
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval().float()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    text = [line for line in Path("LICENSE").read_text().split("\n\n") if len(line) > 200][:6]
    batch = words(text, padding=True, truncation=True, max_length=64, return_tensors="pt")
    found = mj.pretrained.load("minilm-l6")
    tokenizer = mj.pretrained.tokenizer_of("minilm-l6")
    for row, used, line in zip(batch.input_ids, batch.attention_mask, text, strict=True):
        count = int(used.sum()) - 1  # without the last, which ends the text wherever it is cut
        assert tokenizer.encode(line).ids[:count] == row.tolist()[:count]
    one = beside.Beside(theirs, mj.models.build(found.model), found)
    with torch.no_grad():
        expected = theirs(**batch, output_hidden_states=True)
    mask = batch.attention_mask.bool()
    ctx = mj.Context(valid=jnp.asarray(mask.numpy()))
    given = beside.blocks_of(one, batch.input_ids.numpy(), ctx)
    for ours, hidden in zip(given, expected.hidden_states[1:], strict=True):
        assert beside.distance(ours[mask.numpy()], hidden[mask]) < 1e-4
    mean = (expected.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    sentence = mj.models.encoder.mean_of_tokens(jnp.asarray(given[-1]), ctx)
    assert beside.distance(sentence, torch.nn.functional.normalize(mean)) < 1e-5


def test_vit(tmp_path: Path) -> None:
    settings = {
        "image_size": 12, "patch_size": 4, "num_channels": 2, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_labels": 5,
    }  # fmt: skip
    one = beside.make("ViTForImageClassification", tmp_path / "a", **settings)
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 2)).astype(np.float32)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = one.theirs(pixels, output_hidden_states=True)
    assert beside.distance(jax.jit(one.model.apply)(one.found.variables, images), theirs.logits) < 1e-5
    given = beside.blocks_of(one, images)
    for ours, hidden in zip(given[:-1], theirs.hidden_states[1:-1], strict=True):
        assert beside.distance(ours, hidden) < 1e-5
    mj.pretrained.save(one.found, tmp_path / "b")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert beside.distance(again(pixels).logits.numpy(), theirs.logits) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, mj.pretrained.load(str(tmp_path / "b")).variables, one.found.variables)
