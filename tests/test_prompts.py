"""Prompts to token ids: templates, lengths, and the same in a worker process."""

import copy
import pickle

import pytest

from vugen_cli.errors import VugenError
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm
from vugen_cli.vlm.prompts import Prompts, rendered


@pytest.fixture(scope="module")
def nano() -> FrozenVLM:
    return load_vlm("nano")


def limited(vlm: FrozenVLM, longest: int) -> Prompts:
    return Prompts(vlm.processor.tokenizer, "nano", "{prompt}", longest)


def test_a_caption_within_the_limit_is_left_as_it_is(nano: FrozenVLM) -> None:
    for caption in ("a bear in a forest", "", "two cats on a beach " * 3):
        assert nano.prompts.caption_tokens(caption) == (nano.prompts.tokens(caption), False)


@pytest.mark.parametrize("longest", [1, 3, 7])
def test_a_longer_caption_is_cut_to_its_first_tokens(nano: FrozenVLM, longest: int) -> None:
    prompts = limited(nano, longest)
    ids, cut = prompts.caption_tokens("a bear in a forest at night " * 1000)
    assert cut and len(ids) <= longest + len(prompts.tokens(""))
    assert ids[0] == prompts.tokens("")[0], "the chat template is kept whole"
    kept = nano.processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert "bear" in kept or longest == 1


def test_a_longer_prompt_is_refused_with_the_key_that_says_so(nano: FrozenVLM) -> None:
    with pytest.raises(VugenError, match=r"a prompt of 5\d\d\d tokens is too long: .* prompt_tokens"):
        nano.prompts.tokens("bear " * 5000)


def test_the_tokenizer_does_not_warn_before_it(nano: FrozenVLM) -> None:
    tokenizer = copy.deepcopy(nano.processor.tokenizer)
    tokenizer.model_max_length, tokenizer.deprecation_warnings = 4, {}
    with pytest.raises(VugenError, match="too long"):
        Prompts(tokenizer, "nano", "{prompt}", 8).tokens("bear " * 20)
    assert not tokenizer.deprecation_warnings  # where it notes that it has warned


def test_a_model_of_few_positions_keeps_half_of_them_for_the_image(nano: FrozenVLM) -> None:
    prompts = Prompts(nano.processor.tokenizer, "nano", "{prompt}", 128, positions=40)
    ids, cut = prompts.caption_tokens("bear " * 100)
    assert cut and len(ids) <= 20


def test_the_instruction_and_a_prompt_said_twice_keep_to_their_half(nano: FrozenVLM) -> None:
    prompts = Prompts(nano.processor.tokenizer, "nano", "draw {prompt}: {prompt}", 128, positions=80)
    ids, cut = prompts.caption_tokens("bear " * 100)
    assert cut and 30 <= len(ids) <= 40


@pytest.mark.parametrize("of", ["tokenizer", "processor"])
def test_a_template_that_tells_the_date_says_the_same_on_every_day(nano: FrozenVLM, of: str) -> None:
    processor = copy.deepcopy(nano.processor)
    by = processor if of == "processor" else processor.tokenizer
    by.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'][0]['text'] }}"
    assert rendered(by, [{"type": "text", "text": "a bear"}]) == "26 Jul 2024: a bear"


def test_prompts_go_to_a_worker_process(nano: FrozenVLM) -> None:
    assert pickle.loads(pickle.dumps(nano.prompts)).tokens("a bear") == nano.prompts.tokens("a bear")
