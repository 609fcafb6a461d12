"""Every family of causal language models alike: probabilities that sum to 1, and draws that meet their scores."""

import pytest
import torch
from conftest import EOS, MAX_LENGTH, VOCABULARY, ALDRIFTTrainer, count_a, every_completion, log_probs
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from aldrift_hf.models import head as projection
from aldrift_hf.models.fidelity import Rows
from aldrift_hf.models.generation import assert_neutral, generate, neutral_generation_config
from aldrift_hf.models.prior import base_model
from aldrift_hf.models.scoring import inference, sequence_logprobs
from aldrift_hf.streams import uniforms

pytestmark = pytest.mark.versions

LENGTH = 12  # longer than the sliding windows
PROMPTS = [[EOS], [2, 3], [4, 4, 2, 3, 1]]
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": None}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    **TOKENS,
}
GROUPED = {"num_key_value_heads": 1, **SIZES}
SLIDING = {"head_dim": 8, "sliding_window": 2, "layer_types": ["sliding_attention", "full_attention"], **GROUPED}
EXPERTS = {"num_experts_per_tok": 2, **GROUPED}
CONFIGS = {
    "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, **TOKENS),
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**{**GROUPED, "sliding_window": 2}),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(head_dim=8, **GROUPED),
    "gemma2": lambda: Gemma2Config(**SLIDING, final_logit_softcapping=1.5),
    "gemma3": lambda: Gemma3TextConfig(**SLIDING, final_logit_softcapping=1.5),
    "phi": lambda: PhiConfig(**GROUPED),
    "phi3": lambda: Phi3Config(**{**GROUPED, "pad_token_id": 1}),
    "opt": lambda: OPTConfig(
        **{**SIZES, "pad_token_id": 1}, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, dropout=0.0
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "cohere": lambda: CohereConfig(**GROUPED, logit_scale=0.25),
    "falcon": lambda: FalconConfig(**SIZES),  # asks for its attention by name
    "bloom": lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3, **TOKENS),
    "granite": lambda: GraniteConfig(**GROUPED, logits_scaling=3.0),
    "mixtral": lambda: MixtralConfig(**EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**EXPERTS, head_dim=8, moe_intermediate_size=16, num_experts=4),
    # Attention beside recurrence: caches that cannot be cut.
    "lfm2": lambda: Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "jamba": lambda: JambaConfig(
        **{**GROUPED, "pad_token_id": 1},
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "mamba": lambda: MambaConfig(
        hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3, **{**TOKENS, "pad_token_id": 1}
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()


def test_probabilities_sum_to_one(model):
    for prompt in PROMPTS:
        scores = log_probs(model, prompt, every_completion())
        assert scores.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
        assert scores.std() > 0.3, "nearly uniform: the test shows little"


def test_scores_are_those_of_the_models_own_logits(model):
    """Token by token, without padding or batch: what the model says, its last touch to the logits included."""
    assert_own_logits(model)
    assert projection._known[model] is not None, "scored from whole batches of logits"


@pytest.mark.parametrize("with_adapter", [True, False])
def test_what_is_learned_is_what_is_scored(model, with_adapter):
    """The training step's forward pass, on rows that it pads."""
    policy, rows = model, Rows.for_model(model)
    if with_adapter:
        modules = ["in_proj"] if model.config.model_type == "mamba" else "all-linear"
        policy = get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    with inference(policy):
        assert rows.logprobs(policy) == pytest.approx(rows.scores(base_model(policy)), abs=1e-5)


def test_every_forward_pass_has_a_mask(model):
    """Without one, transformers warns of tokens that pad; and a completion may have such tokens."""
    masks = []
    model.register_forward_pre_hook(
        lambda model, args, inputs: masks.append(inputs.get("attention_mask")), with_kwargs=True
    )
    log_probs(model, PROMPTS[0], every_completion())
    assert len(masks) >= 2
    assert all(mask is not None for mask in masks)


class Ruled(GPT2LMHeadModel):
    """A model in which one token hardly ever follows a certain other."""

    before = 0

    def forward(self, input_ids, **inputs):
        output = super().forward(input_ids, **inputs)
        output.logits[..., 2] -= 8.0 * (input_ids == self.before)
        return output


@pytest.mark.parametrize("before", range(VOCABULARY))
def test_what_a_model_does_to_its_logits_may_depend_on_the_token_before(before):
    torch.manual_seed(0)
    model = Ruled(CONFIGS["gpt2"]()).eval()
    model.before = before
    assert_own_logits(model)
    assert projection._known[model] is None


def assert_own_logits(model):
    completions = every_completion()
    for prompt in PROMPTS:
        scores = log_probs(model, prompt, completions)
        for row in range(0, len(scores), 17):
            tokens = completions.tokens()[row]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            by_hand = logits.double().log_softmax(-1)[range(len(tokens)), tokens].sum().item()
            assert scores[row].item() == pytest.approx(by_hand, abs=2e-5)


def test_draws_meet_their_scores(model):
    """Prompts of three lengths in one batch, padded on the left, and rows that leave it as they end."""
    prompts = [PROMPTS[row % 3] for row in range(300)]
    ends = [EOS, 1, 3]
    config = neutral_generation_config(max_completion_length=LENGTH, eos_token_ids=ends, pad_token_id=EOS)
    with inference(model):
        assert_neutral(model, [2], config)
        drawn = generate(model, prompts, config, uniforms((0,), range(300), LENGTH))
        scores = sequence_logprobs(model, prompts, drawn.completions, pad_token_id=EOS, batch_size=64)
    assert (drawn.completions.length == LENGTH).double().mean() < 0.4, "no row has left early: the test shows less"
    assert len(drawn.completions.length.unique()) > 4
    assert torch.allclose(drawn.log_probs, scores, atol=5e-5)


@pytest.mark.slow
def test_a_run_fits_an_adapter_and_leaves_the_prior_alone(model, config, tokenizer):
    before = log_probs(model, [EOS], every_completion())
    targets = ["in_proj", "x_proj"] if model.config.model_type == "mamba" else "all-linear"  # PEFT takes no others
    trainer = ALDRIFTTrainer(
        model,
        count_a,
        config(num_rungs=1, max_completion_length=MAX_LENGTH),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets),
    )
    trainer.train()
    learnt = log_probs(base_model(trainer.model), [EOS], every_completion())
    with inference(trainer.model), trainer.rollout.prior.active(trainer.model) as prior_model:
        after = log_probs(prior_model, [EOS], every_completion())
    assert torch.allclose(after, before, rtol=0, atol=1e-5)  # Mamba takes another path beside an adapter, by rounding
    assert (learnt - before).abs().max() > 1e-3
    assert learnt.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_routers_auxiliary_loss_is_refused(family, config, tokenizer):
    """It would be left out in silence: the Trainer hands the labels to our loss, not to the model."""
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"output_router_logits=False, in model\.config or in model_init_kwargs"):
        ALDRIFTTrainer(model, count_a, config(), processing_class=tokenizer)
