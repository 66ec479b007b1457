"""Model and tokenizer in one call: what is made of the models that people have, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_samplers import Tweedie, Unmasking, infill, pad_prompts, prompt_ids, sample
from sedd_samplers.adapters import from_hf, from_logits, from_masked_lm, from_posterior, to_posterior
from sedd_samplers.adapters.processes import Masking, Proportional, Replacing
from sedd_samplers.token_ids import banned_of, ends_of, mask_of, pad_of
from torch import Tensor

PAD, CLS, SEP, MASK, WORDS = 0, 1, 2, 4, 12


class Tokenizer:
    """Words as numbers with a frame or without: "7 8" is 7, 8."""

    def __init__(self, size: int = WORDS, *, frame: bool = True, **ids: int | None) -> None:
        self.size, self.frame = size, frame
        named: dict[str, int | None] = {"pad": PAD, "cls": CLS if frame else None, "sep": SEP if frame else None}
        named |= {"mask": MASK, "eos": None, **ids}
        self.all_special_ids = [i for i in named.values() if i is not None]
        for name, value in named.items():
            setattr(self, f"{name}_token_id", value)

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.size)}

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [int(word) for word in text.split()]
        return {"input_ids": [CLS, *ids, SEP] if self.frame and add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> dict[str, list[list[int]]]:
        assert options == {"add_generation_prompt": True, "tokenize": True}
        return {"input_ids": [[3, *(int(word) for m in messages for word in m["content"].split()), 3]]}


class Network(torch.nn.Module):
    """A bag of words with a place: logits at i from what is not padding, and from how far i is into the text."""

    def __init__(self, width: int = WORDS, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(width, 8), torch.nn.Linear(8, width)
        self.place = torch.nn.Embedding(32, 8)
        self.config, self.seen = SimpleNamespace(vocab_size=width, **config), list[dict[str, Any]]()
        self.eval()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def hidden(self, x: Tensor, seen: Tensor, place: Tensor) -> Tensor:
        h = self.embed(x) * seen[..., None]
        out: Tensor = h + h.sum(1, keepdim=True) / seen.sum(1)[:, None, None] + self.place(place)
        return out


class LLaDA(Network):
    """The surface of LLaDA's remote code: positions are counted by itself, the mask stands in its configuration."""

    def forward(self, input_ids: Tensor, inputs_embeds: None = None, attention_mask: Tensor | None = None) -> Any:
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.seen.append({"attention_mask": attention_mask})
        place = (seen.cumsum(1) - 1).clamp(min=0)
        return SimpleNamespace(logits=self.head(self.hidden(input_ids, seen, place)))


class Dream(Network):
    """The surface of Dream's remote code: logits of the next token, a mask of pairs, position ids, its own sampler."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | str = "full", position_ids: Tensor | None = None
    ) -> Any:
        self.seen.append({"attention_mask": attention_mask, "position_ids": position_ids})
        assert not isinstance(attention_mask, str)
        assert attention_mask.dtype == torch.bool
        assert attention_mask.shape == (len(input_ids), 1, input_ids.shape[1], input_ids.shape[1])
        seen = attention_mask[:, 0].diagonal(dim1=1, dim2=2).long()
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids) if position_ids is None else position_ids
        return (self.head(self.hidden(input_ids, seen, place)),)

    def diffusion_generate(self) -> None:
        """What it is known by."""


def posterior(adapted: Any, x: Tensor) -> Tensor:
    return to_posterior(adapted.score, adapted.graph)(x, torch.ones(len(x), dtype=torch.float64))


def masked_x() -> Tensor:
    return torch.tensor([[CLS, 5, MASK, MASK, SEP, PAD], [CLS, MASK, MASK, 7, 8, SEP]])


def test_a_masked_language_model_with_its_defaults() -> None:
    """What is drawn are words: no special token, no padding seen, the frame kept."""
    model, x = LLaDA(), masked_x()
    score, graph, noise, options = from_hf(model, Tokenizer())
    assert (graph.num_states, graph.mask_id, options) == (WORDS, MASK, {"method": Unmasking()})
    y = infill(score, graph, noise, x=x, given=x != MASK, seeds=[1, 2], **options)
    assert torch.equal(y[x != MASK], x[x != MASK])
    assert not torch.isin(y[x == MASK], torch.tensor([PAD, CLS, SEP, MASK])).any()
    assert all((part["attention_mask"].sum(1) >= 5).all() for part in model.seen)
    alone = infill(score, graph, noise, x=x[:1, :5], given=x[:1, :5] != MASK, seeds=[1], **options)
    assert torch.equal(y[:1, :5], alone)


def test_ids_that_cannot_be_decoded_and_special_ones_are_not_drawn() -> None:
    """A head wider than the tokenizer, as LLaDA's by 115 and Dream's by 397."""
    for width in (WORDS + 3, WORDS + 400):
        adapted = from_hf(LLaDA(width), Tokenizer())
        p = posterior(adapted, masked_x())[masked_x() == MASK]
        assert adapted.graph.num_states == width
        assert (p[:, WORDS:] == 0).all()
        assert (p[:, [PAD, CLS, SEP, MASK]] == 0).all()
        assert (p[:, [3, *range(5, WORDS)]] > 0).all()
    holes = Tokenizer()
    holes.get_vocab = lambda: {str(i): i for i in range(WORDS) if i != 9}  # type: ignore[method-assign]
    assert (posterior(from_hf(LLaDA(), holes), masked_x())[masked_x() == MASK][:, 9] == 0).all()
    more = from_hf(LLaDA(), Tokenizer(), banned=[10])
    assert (posterior(more, masked_x())[masked_x() == MASK][:, 10] == 0).all()


def test_a_head_without_the_mask_has_a_state_for_it() -> None:
    """DNA: four outputs, the mask after them."""
    adapted = from_hf(LLaDA(4), mask_id=4)
    assert (adapted.graph.num_states, adapted.graph.mask_id) == (5, 4)
    model = LLaDA(4)
    model.embed = torch.nn.Embedding(5, 8)
    x = sample(*from_hf(model, mask_id=4)[:3], shape=(3, 9), steps=4)
    assert ((x >= 0) & (x < 4)).all()


def test_ends_are_drawn_where_texts_are_not_framed_and_padding_does_not_hide_them() -> None:
    """LLaDA: the same token ends and pads, and every end is seen by the model; padding is told by a mask."""
    model, tokenizer = LLaDA(eos_token_id=3, pad_token_id=3), Tokenizer(frame=False, eos=3, pad=3)
    x = torch.tensor([[5, 3, MASK, MASK, 6, 3], [5, 6, MASK, 7, 8, 9]])
    adapted = from_hf(model, tokenizer)
    p = posterior(adapted, x)[x == MASK]
    assert (p[:, 3] > 0).all()
    assert (model.seen[-1]["attention_mask"] == 1).all()
    seen = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])
    padded = from_hf(model, tokenizer, attention_mask=seen)
    posterior(padded, x)
    assert torch.equal(model.seen[-1]["attention_mask"], seen)
    framed = from_hf(LLaDA(), Tokenizer(eos=SEP))  # RoBERTa's end is its frame
    assert (posterior(framed, masked_x())[masked_x() == MASK][:, SEP] == 0).all()
    with pytest.raises(ValueError, match=r"pad_id=3 also ends texts, and every end would be hidden from the LLaDA"):
        from_masked_lm(model, adapted.graph, pad_id=3)


def test_dream_reads_one_place_on_and_gets_a_mask_of_pairs() -> None:
    x, model = masked_x(), Dream(mask_token_id=MASK)
    x[:, 0] = MASK
    plain = from_hf(model, Tokenizer(), attention_mask=torch.ones(2, 6))
    with torch.no_grad():
        logits = model(x, torch.ones(2, 1, 6, 6).bool())[0]
    logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    logits[..., [PAD, CLS, SEP, MASK]] = -torch.inf
    torch.testing.assert_close(posterior(plain, x)[x == MASK], logits.softmax(-1)[x == MASK])
    unshifted = from_hf(model, Tokenizer(), attention_mask=torch.ones(2, 6), shifted=False)
    assert (posterior(unshifted, x) - posterior(plain, x))[x == MASK].abs().max() > 0.01
    pads = from_hf(model, Tokenizer())  # the first text ends in padding
    posterior(pads, x)
    assert not model.seen[-1]["attention_mask"][0, 0, :, 5].any()
    assert model.seen[-1]["attention_mask"][1].all()


@pytest.mark.parametrize("kind", [LLaDA, Dream])
def test_padding_on_the_left_changes_nothing(kind: Any) -> None:
    """A text alone, and padded before its first token beside a longer one, with the same token that ends texts."""
    model, tokenizer = kind(eos_token_id=3, mask_token_id=MASK), Tokenizer(frame=False, eos=3, pad=3)
    x, given = pad_prompts([[5, 6], [7, 8, 9]], [5, 8], pad_id=3, left=True)
    seen = torch.arange(8) >= torch.tensor([[3], [0]])
    score, graph, noise, options = from_hf(model, tokenizer, attention_mask=seen)
    both = infill(score, graph, noise, x=x, given=given, seeds=[1, 2], **options)
    short, held = pad_prompts([[5, 6]], 5)
    score, graph, noise, options = from_hf(model, tokenizer, attention_mask=torch.ones(1, 5))
    alone = infill(score, graph, noise, x=short, given=held, seeds=[1], **options)
    # draws are by position, which padding shifts: the law of the first mask is the same
    first = [posterior(from_hf(model, tokenizer, attention_mask=mask), text)[0, place] for mask, text, place in (
        (seen, torch.where(given, x, MASK), 5), (torch.ones(1, 5), torch.where(held, short, MASK), 2),
    )]  # fmt: skip
    torch.testing.assert_close(*first)
    assert torch.equal(both[0, :5], torch.tensor([3, 3, 3, 5, 6]))
    assert torch.equal(alone[0, :2], torch.tensor([5, 6]))


def test_prompts_are_padded_on_the_left() -> None:
    x, given = pad_prompts([[5, 6], [7]], [3, 5], pad_id=9, left=True)
    assert x.tolist() == [[9, 9, 5, 6, 9], [7, 9, 9, 9, 9]]
    assert given.int().tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]


def test_a_prompt_ends_where_its_text_ends() -> None:
    """[CLS] stays, [SEP] goes; a conversation goes by the template."""
    assert prompt_ids(Tokenizer(), "7 8") == [CLS, 7, 8]
    assert prompt_ids(Tokenizer(), "") == [CLS]
    assert prompt_ids(Tokenizer(frame=False), "") == []
    assert prompt_ids(Tokenizer(frame=False), "7 8") == [7, 8]
    assert prompt_ids(Tokenizer(), [{"role": "user", "content": "7 8"}]) == [3, 7, 8, 3]
    changing = Tokenizer()
    changing.__class__ = type("Changing", (Tokenizer,), {
        "__call__": lambda self, text, add_special_tokens=True: {"input_ids": [CLS, 5] if add_special_tokens else [6]}
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"gives \[6\] for '7' and, with special tokens, \[1, 5\]"):
        prompt_ids(changing, "7")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: from_hf(LLaDA(), Tokenizer(mask=None)), r"no mask can be found for the LLaDA: .* mask_id="),
        (lambda: from_hf(LLaDA()), "no mask can be found"),
        (
            lambda: from_hf(LLaDA(mask_token_id=5), Tokenizer()),
            r"the tokenizer's mask_token_id is 4 and the configuration's mask_token_id is 5: say which",
        ),
        (lambda: from_hf(LLaDA(), Tokenizer(), prompt=torch.zeros(1, 2).long()), "gets its prompt as given tokens"),
        (lambda: from_hf(LLaDA(), Tokenizer(), own_decoder=True), "for models that write a canvas after a prompt"),
        (lambda: from_hf(lambda input_ids: input_ids, mask_id=1), "nothing says how many tokens the function has"),
        (
            lambda: from_masked_lm(LLaDA(mask_token_id=5), Masking(WORDS, 4)),
            "the graph's mask is 4, and the LLaDA has 5",
        ),
        (lambda: Masking(4, None), r"mask_id must be one of the states 0..3, got None"),  # type: ignore[arg-type]
        (lambda: Masking(4, 4), r"mask_id must be one of the states 0..3, got 4"),
    ],
)
def test_a_mask_is_found_or_asked_for_and_never_guessed(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_a_mask_comes_from_whoever_names_it() -> None:
    assert from_hf(LLaDA(mask_token_id=4), Tokenizer(mask=None)).graph.mask_id == 4
    assert from_hf(LLaDA(), Tokenizer()).graph.mask_id == 4
    assert from_hf(LLaDA(), Tokenizer(mask=None), mask_id=7).graph.mask_id == 7


class Dropping(Network):
    """ESM-2's token dropout: embeddings over the share of tokens that are no masks."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        share = (input_ids == MASK).sum(1) / attention_mask.sum(1)
        h = self.embed(input_ids) * (input_ids != MASK)[..., None] / (1 - share)[:, None, None]
        return SimpleNamespace(logits=self.head(h + h.sum(1, keepdim=True)))


def test_a_model_that_drops_tokens_is_given_its_frame() -> None:
    model = Dropping(token_dropout=True)
    score, graph, noise, options = from_hf(model, Tokenizer())
    with pytest.raises(ValueError, match=r"the Dropping divides by the share .* give it its frame \(CLS and EOS\)"):
        sample(score, graph, noise, shape=(2, 5), **options)
    x = torch.tensor([[CLS, MASK, MASK, MASK, SEP]])
    y = infill(score, graph, noise, x=x, given=x != MASK, steps=4, **options)
    assert (y != MASK).all()


def test_networks_of_other_clocks_take_one_lambda_each() -> None:
    """A flow's p(x0) at its own time, and a network that takes sigma as (B, 1)."""
    graph, seen = Replacing(5), list[Tensor]()
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def flow(x: Tensor, time: Tensor) -> Tensor:  # its clock runs from noise, 0, to data, 1
        seen.append(time)
        return (table[x] * (1 + time[:, None, None])).softmax(-1)

    def column(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (len(x), 1)
        return table[x] * (1 + torch.exp(-sigma[:, None]))

    x, sigma = torch.arange(5)[None], torch.tensor([0.7], dtype=torch.float64)
    one = from_posterior(lambda x, sigma: flow(x, torch.exp(-sigma)), graph)(x, sigma)
    other = from_logits(lambda x, sigma: column(x, sigma[:, None]), graph)(x, sigma)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(seen[0], torch.exp(-sigma))


def test_the_processes_are_those_of_their_generators(ref: Any) -> None:
    """Rates and transitions against matrix exponentials; the rows name each state once."""
    for graph, Q in (
        (Masking(5, 2), ref.absorbing_matrix(4, 2).Q),
        (Masking(5, 0), ref.absorbing_matrix(4, 0).Q),
        (Replacing(5), ref.uniform_matrix(5).Q),
    ):
        x, sigma = torch.arange(5), torch.linspace(0.1, 3, 5, dtype=torch.float64)
        exact = torch.linalg.matrix_exp(sigma[:, None, None] * Q)

        def dense(row: Any) -> Tensor:
            assert all(len(set(index.tolist())) == len(index) for index in row.index)
            out: Tensor = row.base[:, None].expand(-1, 5).scatter(1, row.index, row.value).double()
            return out

        torch.testing.assert_close(dense(graph.rates_into(x)), Q.float().double())
        torch.testing.assert_close(dense(graph.rates_out_of(x)), Q.T.float().double())
        torch.testing.assert_close(dense(graph.transition_into(x, sigma)), exact[x, x])
        both = graph.transition_into(torch.stack([x, x]), sigma[:2])
        torch.testing.assert_close(both.base[1], graph.transition_into(x, sigma[1]).base)
        v = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(graph.propagate(v, sigma), (exact @ v[..., None])[..., 0])
        torch.testing.assert_close(graph.propagate(graph.propagate(v, sigma), -sigma), v)
        limit = torch.linalg.matrix_exp(200 * Q)[:, 1]
        prior = graph.prior(torch.tensor(torch.inf, dtype=torch.float64))
        torch.testing.assert_close(prior.base.expand(5).scatter(0, prior.index, prior.value), limit)
    t = torch.tensor([0.1, 0.9], dtype=torch.float64, requires_grad=True)
    level, slope = Proportional()(t)
    torch.testing.assert_close(slope, torch.autograd.grad(level.sum(), t)[0])
    torch.testing.assert_close(Proportional().time(level), t)


def test_tweedie_and_controls_go_with_what_is_adapted(ref: Any) -> None:
    adapted = from_hf(LLaDA(), Tokenizer(), controls=[lambda p, sequence, position: p * (torch.arange(WORDS) == 6)])
    x = sample(*adapted[:3], shape=(2, 4), steps=3, method=Tweedie())
    assert (x == 6).all()


def test_a_vocabulary_is_as_wide_as_the_head_the_configuration_or_the_tokenizer_says() -> None:
    tokenizer, bare = Tokenizer(), SimpleNamespace(weight=torch.zeros(3))
    for head, size, width in ((torch.nn.Linear(2, 17), 20, 17), (bare, 20, 20), (None, 20, 20), (bare, None, WORDS)):
        model: Any = lambda input_ids: input_ids  # noqa: E731
        model.get_output_embeddings = lambda head=head: head
        model.config = SimpleNamespace(**({} if size is None else {"vocab_size": size}))
        assert from_hf(model, tokenizer).graph == Masking(width, MASK)
    assert from_hf(LLaDA(9), mask_id=12).graph == Masking(13, 12)  # a mask beyond the head is a state


def test_places_are_counted_where_there_is_no_padding() -> None:
    """Left padding stands at place 0, and places are told only to whoever takes them and is told of padding."""
    model, x = Dream(mask_token_id=MASK), masked_x()
    seen = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    posterior(from_hf(model, Tokenizer(), attention_mask=seen), x)
    assert model.seen[-1]["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 3]]
    pairs = model.seen[-1]["attention_mask"][:, 0]
    assert torch.equal(pairs, seen[:, :, None].bool() & seen[:, None].bool())
    posterior(from_hf(model, Tokenizer()), x)
    assert model.seen[-1]["position_ids"] is None


def part(**named: Any) -> Any:
    return SimpleNamespace(**named)


def test_ids_are_those_that_are_named() -> None:
    assert ends_of(part(eos_token_id=3), part(eos_token_id=[4, 5]), part(eos_token_id=(6,)), part()) == {3, 4, 5, 6}
    assert ends_of(None, part(eos_token_id=None), part(eos_token_id=0)) == {0}
    assert pad_of(part(config=part(pad_token_id=7)), part(pad_token_id=None)) == 7
    assert pad_of(part(config=part(pad_token_id=7)), part(pad_token_id=0)) == 0
    assert pad_of(part(config=part(eos_token_id=[0, 2])), part(pad_token_id=0)) is None
    assert pad_of(part(), None) is None
    assert mask_of(None, part(mask_token_id=0), None) == 0
    assert mask_of(part(config=part(mask_token_id=5)), part(mask_token_id=5), None) == 5
    assert mask_of(part(config=part(mask_token_id=5)), part(mask_token_id=4), 0) == 0
    assert banned_of(None, None, 9) == []
    words = {"a": 0, "b": 2, "far": 11}
    tokenizer = part(get_vocab=lambda: words, all_special_ids=[2, 11], cls_token_id=None, eos_token_id=2)
    assert banned_of(part(), tokenizer, 5) == [1, 3, 4]
    framed = part(get_vocab=lambda: words, all_special_ids=[2, 11], cls_token_id=0, eos_token_id=2)
    assert banned_of(part(), framed, 5) == [1, 2, 3, 4]
    assert banned_of(part(config=part(eos_token_id=0)), part(get_vocab=lambda: words, all_special_ids=[0, 2]), 3) == [
        1,
        2,
    ]


def test_a_prompt_s_text_is_found_inside_its_frame() -> None:
    """Wherever it begins; ids in a tensor or a batch of one are ids."""

    class Framed:
        def __init__(self, before: list[int], after: list[int], **named: Any) -> None:
            self.before, self.after = before, after
            self.__dict__.update(named)

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
            ids = [int(word) for word in text.split()]
            return {"input_ids": torch.tensor([[*self.before, *ids, *self.after] if add_special_tokens else ids])}

    assert prompt_ids(Framed([1, 2], [3]), "7 8") == [1, 2, 7, 8]
    assert prompt_ids(Framed([], [3]), "7") == [7]
    assert prompt_ids(Framed([1], [3], sep_token_id=3), "") == [1]
    assert prompt_ids(Framed([1], [4], eos_token_id=4), "") == [1]
    assert prompt_ids(Framed([1], []), "") == [1]
    assert prompt_ids(Framed([], []), "") == []


def test_what_is_told_of_padding_is_of_the_sequences_asked_about() -> None:
    """The second of two, the first being finished; int64 to models that take a mask of positions."""
    seen, x = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]), torch.full((2, 6), 7)
    given = torch.tensor([[True] * 6, [True, True, False, True, True, True]])
    for kind in (LLaDA, Dream):
        model = kind(mask_token_id=MASK)
        score, graph, noise, options = from_hf(model, Tokenizer(), attention_mask=seen)
        infill(score, graph, noise, x=x, given=given, steps=3, **options)
        told = model.seen[-1]["attention_mask"]
        if kind is LLaDA:
            assert told.dtype == torch.int64
            assert told.tolist() == [seen[1].tolist()]
        else:
            assert told[0, 0].diagonal().tolist() == seen[1].bool().tolist()
            assert model.seen[-1]["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4]]


def test_padding_is_drawn_where_a_mask_tells_what_is_padding() -> None:
    """And never where it is known by its id: the tokenizer does not call it special here."""
    tokenizer, x = Tokenizer(), masked_x()
    tokenizer.all_special_ids = [CLS, SEP, MASK]
    one = posterior(from_hf(LLaDA(), tokenizer), x)[x == MASK]
    other = posterior(from_hf(LLaDA(), tokenizer, attention_mask=torch.ones(2, 6)), x)[x == MASK]
    assert (one[:, PAD] == 0).all()
    assert (other[:, PAD] > 0).all()
    nothing = posterior(from_hf(LLaDA(), None, mask_id=MASK, banned=None), x)[x == MASK]
    assert (nothing[:, [PAD, CLS, SEP]] > 0).all()


def test_any_model_may_be_said_to_be_shifted() -> None:
    model, x = LLaDA(), masked_x()
    plain = posterior(from_hf(model, Tokenizer()), x)
    shifted = posterior(from_hf(model, Tokenizer(), shifted=True), x)
    torch.testing.assert_close(shifted[1, 2], plain[1, 1])  # of the mask before
    assert (shifted - plain)[x == MASK].abs().max() > 0.01


def test_a_schedule_for_models_without_a_clock_takes_all_but_a_thousandth() -> None:
    noise = from_hf(LLaDA(), Tokenizer()).noise
    sigma, pace = noise(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert torch.exp(-sigma).tolist() == pytest.approx([1.0, 0.5005, 1e-3])
    assert pace.tolist() == pytest.approx([0.999, 0.999 / 0.5005, 999.0])
