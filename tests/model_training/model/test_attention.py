"""Who may attend to whom: said once slowly, and the same in each kernel's form."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paracaption.model_training.model.attention import (
    HIDDEN,
    PADDING,
    SHARED,
    AttentionMask,
    TokenRoles,
    dense_mask,
    join_roles,
    mask_mod,
)
from paracaption.model_training.model.batch import collate
from tests.model_training.tiny_models import examples, lively

KERNELS = ["sdpa", "flex_attention"]

PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """FlexAttention on a CPU traces itself before it runs eagerly; that takes ten seconds."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@st.composite
def rows(draw, max_samples=3):
    """One row of a batch as [(sample, region, caption)]: samples one after the other, then padding."""
    row = []
    for sample in range(draw(st.integers(1, max_samples))):
        regions = draw(st.integers(0, 3))
        prefix = [SHARED, HIDDEN, *range(1, 1 + regions)]
        row += [(sample, code, False) for code in draw(st.lists(st.sampled_from(prefix), min_size=1))]
        for region in range(1, 1 + regions):
            row += [(sample, region, True)] * draw(st.integers(1, 3))
    return row + [(PADDING, SHARED, False)] * draw(st.integers(0, 3))


@st.composite
def drawn_roles(draw):
    """A batch of such rows, of one length."""
    found = draw(st.lists(rows(), min_size=1, max_size=3))
    length = max(map(len, found))
    found = [row + [(PADDING, SHARED, False)] * (length - len(row)) for row in found]
    return roles_of(found)


def roles_of(found):
    sample, region, caption = (
        torch.tensor([[token[part] for token in row] for row in found]) for part in range(3)
    )
    return TokenRoles(sample, region, caption)


def slowly(roles, isolate_prefix):
    """The rules, pair by pair."""
    batch, length = roles.sample_BL.shape
    allowed = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for query in range(length):
            for key in range(length):
                q_sample, q_region, q_caption = (int(part[row, query]) for part in roles)
                k_sample, k_region, k_caption = (int(part[row, key]) for part in roles)
                if q_sample != k_sample:
                    continue  # another sample of the row, or padding
                if q_caption:  # a caption: what is shared, its own replay and itself
                    allowed[row, query, key] = k_region == SHARED or k_region == q_region
                else:  # prompt, image, replay, padding
                    allowed[row, query, key] = not (isolate_prefix and k_caption)
    return allowed


@settings(PROPERTY, max_examples=15)
@given(drawn_roles(), st.booleans())
def test_the_dense_mask_is_the_rules_pair_by_pair(roles, isolate_prefix):
    assert torch.equal(dense_mask(roles, roles, isolate_prefix), slowly(roles, isolate_prefix))


@settings(PROPERTY, max_examples=15)
@given(drawn_roles(), drawn_roles(), st.booleans())
def test_the_mask_of_pairs_equals_the_dense_mask(queries, keys, isolate_prefix):
    rows = min(len(queries.sample_BL), len(keys.sample_BL))
    queries, keys = queries.at(slice(rows)), keys.at(slice(rows))
    dense = dense_mask(queries, keys, isolate_prefix)
    batch, num_queries, num_keys = (torch.arange(side) for side in dense.shape)
    of_pair = mask_mod(queries, keys, isolate_prefix)
    pairs = of_pair(batch[:, None, None], None, num_queries[None, :, None], num_keys[None, None])
    assert torch.equal(pairs, dense)


@settings(PROPERTY, max_examples=15)
@given(drawn_roles(), st.booleans())
def test_every_token_sees_itself_so_that_no_row_of_scores_is_empty(roles, isolate_prefix):
    assert dense_mask(roles, roles, isolate_prefix).diagonal(dim1=1, dim2=2).all()


def attended(roles, isolate_prefix, kernel, tokens=None, heads=(4, 2)):
    """What random queries, keys and values come to in float64, and the mask."""
    batch, length = roles.sample_BL.shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, count, length, 16, generator=generator, dtype=torch.float64)
        for count in (heads[0], heads[1], heads[1])
    )
    mask = AttentionMask(roles, roles, isolate_prefix, kernel)
    if tokens is not None:
        q, mask = q[:, :, tokens], mask.for_queries(tokens)
    return mask.attend(q, k, v), (q, k, v), mask


def plainly(q, k, v, allowed):
    """Softmax attention, written out."""
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("kernel", KERNELS)
@settings(PROPERTY, max_examples=5)
@given(roles=drawn_roles(), isolate_prefix=st.booleans(), heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]))
def test_each_kernel_attends_as_written_out(kernel, roles, isolate_prefix, heads):
    found, (q, k, v), _ = attended(roles, isolate_prefix, kernel, heads=heads)
    real = roles.sample_BL != PADDING
    expected = plainly(q, k, v, dense_mask(roles, roles, isolate_prefix))
    difference = (found - expected).transpose(1, 2)[real].abs()
    assert difference.numel() == 0 or difference.max() < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isolate_prefix", [True, False])
def test_a_pattern_of_some_queries_gives_their_part(kernel, isolate_prefix):
    row = [(0, SHARED, False)] * 4 + [(0, 1, False), (0, 2, False), (0, HIDDEN, False)]
    row += [(0, 1, True)] * 3 + [(0, 2, True)] * 3 + [(PADDING, SHARED, False)] * 2
    roles = roles_of([row, row[::-1]])
    whole, _, _ = attended(roles, isolate_prefix, kernel)
    for tokens in (slice(7, None), slice(2, 9), slice(0, 3)):
        part, _, _ = attended(roles, isolate_prefix, kernel, tokens)
        assert (part - whole[:, :, tokens]).abs().max() < 1e-12


@pytest.mark.parametrize("isolate_prefix", [True, False])
@pytest.mark.parametrize("length", [100, 128, 300])
def test_the_blocks_of_the_block_mask_cover_what_is_allowed_and_no_more(isolate_prefix, length):
    third = length // 3
    packed = (
        [(0, SHARED, False)] * third + [(0, 1, True)] * third + [(1, SHARED, False)] * (length - 2 * third)
    )
    roles = roles_of([packed, [(PADDING, SHARED, False)] * length])
    mask = AttentionMask(roles, roles, isolate_prefix, "flex_attention")
    allowed = dense_mask(roles, roles, isolate_prefix)
    blocks = -(-length // 128)
    side = blocks * 128
    padded = torch.zeros(2, side, side, dtype=torch.bool)
    padded[:, :length, :length] = allowed
    expected = padded.unflatten(1, (blocks, 128)).unflatten(3, (blocks, 128)).any(4).any(2)
    assert torch.equal(mask.mask.to_dense()[:, 0].bool(), expected)
    assert mask.mask.seq_lengths == (length, length)


def test_where_everything_is_allowed_no_mask_is_made():
    everyone = roles_of([[(0, SHARED, False)] * 3 + [(0, 1, True)] * 3])
    assert AttentionMask(everyone, everyone, False).mask is None
    assert AttentionMask(everyone, everyone, True).mask is not None
    alone = roles_of([[(0, SHARED, False)] * 3 + [(1, SHARED, False)]])
    assert AttentionMask(alone, alone, False).mask is not None


def test_an_unknown_kernel_is_an_error():
    one = roles_of([[(0, SHARED, False)]])
    with pytest.raises(ValueError, match="sdpa"):
        AttentionMask(one, one, True, "eager")


def test_structures_join_along_the_tokens():
    one, two = roles_of([[(0, SHARED, False)]]), roles_of([[(0, 1, False), (0, 1, True)]])
    both = join_roles(one, two)
    assert torch.equal(both.region_BL, torch.tensor([[SHARED, 1, 1]]))
    assert torch.equal(both.replay_BL(), torch.tensor([[False, True, False]]))


def gradients(layout, regions=3):
    """How much each token's input matters to each kind of output: (row of caption 2, rows of the prefix)."""
    model, processor = lively(layout=layout)
    batch = collate(examples(processor, [regions]))
    tokens = batch.tokens()
    with torch.no_grad():
        x_BLD = model.embed(tokens, *model.encode_images(batch.images))
    x_BLD.requires_grad_()
    logits = model(tokens, inputs_embeds=x_BLD)
    caption = tokens.roles.caption_BL[0]
    second = caption & (tokens.roles.region_BL[0] == 2)
    shares = []
    for rows in (second, ~caption):
        [gradient] = torch.autograd.grad(logits[0, rows].square().sum(), x_BLD, retain_graph=True)
        shares.append(gradient[0].abs().sum(-1))
    return shares, tokens.roles


def test_isolated_captions_pass_nothing_to_the_prefix_or_to_each_other():
    (to_second, to_prefix), roles = gradients("corrected")
    caption, region = roles.caption_BL[0], roles.region_BL[0]
    others = (region > SHARED) & (region != 2)  # replay and captions of other regions
    assert (to_prefix[caption] == 0).all()
    assert (to_prefix[~caption] > 0).all()
    assert (to_second[others & caption] == 0).all()
    assert (to_second[others & ~caption] > 0).all(), "through the prompt, which sees every region"
    assert (to_second[~others] > 0).all()


def test_in_the_reference_layout_captions_see_each_other_through_the_prefix():
    (to_second, to_prefix), _ = gradients("reference")
    assert (to_prefix > 0).all()
    assert (to_second > 0).all()


@pytest.mark.parametrize(("layout", "independent"), [("corrected", True), ("reference", False)])
def test_another_regions_slots_change_a_caption_only_in_the_reference_layout(layout, independent):
    model, processor = lively(layout=layout)
    batch = collate(examples(processor, [3]))
    tokens = batch.tokens()
    caption, region = tokens.roles.caption_BL, tokens.roles.region_BL
    changed = tokens.ids_BL.masked_fill(caption & (region == 3), 65)
    with torch.inference_mode():
        before = model(tokens, batch.images)
        after = model(tokens._replace(ids_BL=changed), batch.images)
    moved = (after - before).abs().amax(-1)
    other = caption & (region != 3)
    assert moved[caption & (region == 3)].min() > 0
    if independent:
        assert moved[other | ~caption].max() == 0
    else:
        assert moved[other].min() > 0
