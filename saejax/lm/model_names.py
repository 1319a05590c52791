"""Model names as TransformerLens spells them (`gpt2-small`, `pythia-70m-deduped`), and the hub ids that they stand for.

Names and ids are those of TransformerLens 3.9, `transformer_lens/supported_models.py`, of the families computed here, with
the SmolLM models added. A repository's name without its owner is understood too. The case of letters does not matter.
"""

_REPOSITORIES = {
    "openai-community": "gpt2 gpt2-medium gpt2-large gpt2-xl",
    "distilbert": "distilgpt2",
    "stanford-crfm": "alias-gpt2-small-x21 battlestar-gpt2-small-x49 caprica-gpt2-small-x81 darkmatter-gpt2-small-x343 "
    "expanse-gpt2-small-x777 arwen-gpt2-medium-x21 beren-gpt2-medium-x49 celebrimbor-gpt2-medium-x81 "
    "durin-gpt2-medium-x343 eowyn-gpt2-medium-x777",
    "EleutherAI": "gpt-neox-20b pythia-14m pythia-31m pythia-160m-seed1 pythia-160m-seed2 pythia-160m-seed3",
    "google": "gemma-2-2b gemma-2-2b-it gemma-2-9b gemma-2-9b-it gemma-2-27b gemma-2-27b-it gemma-3-270m gemma-3-270m-it "
    "gemma-3-1b-pt gemma-3-1b-it gemma-3-4b-pt gemma-3-4b-it gemma-3-12b-pt gemma-3-12b-it gemma-3-27b-pt gemma-3-27b-it "
    "medgemma-4b-pt medgemma-4b-it medgemma-27b-it medgemma-27b-text-it",
    "meta-llama": "Llama-2-7b-hf Llama-2-7b-chat-hf Llama-2-13b-hf Llama-2-13b-chat-hf Llama-2-70b-chat-hf Meta-Llama-3-8B "
    "Meta-Llama-3-8B-Instruct Meta-Llama-3-70B Meta-Llama-3-70B-Instruct Llama-3.1-8B Llama-3.1-8B-Instruct Llama-3.1-70B "
    "Llama-3.1-70B-Instruct Llama-3.2-1B Llama-3.2-1B-Instruct Llama-3.2-3B Llama-3.2-3B-Instruct Llama-3.3-70B-Instruct",
    "codellama": "CodeLlama-7b-hf CodeLlama-7b-Instruct-hf CodeLlama-7b-Python-hf",
    "01-ai": "Yi-6B Yi-6B-Chat Yi-34B Yi-34B-Chat",
    "mistralai": "Mistral-7B-v0.1 Mistral-7B-Instruct-v0.1 Mistral-Nemo-Base-2407 Mistral-Small-24B-Base-2501",
    "Qwen": "Qwen1.5-0.5B Qwen1.5-0.5B-Chat Qwen1.5-1.8B Qwen1.5-1.8B-Chat Qwen1.5-4B Qwen1.5-4B-Chat Qwen1.5-7B "
    "Qwen1.5-7B-Chat Qwen1.5-14B Qwen1.5-14B-Chat Qwen2-0.5B Qwen2-0.5B-Instruct Qwen2-1.5B Qwen2-1.5B-Instruct Qwen2-7B "
    "Qwen2-7B-Instruct Qwen2.5-0.5B Qwen2.5-0.5B-Instruct Qwen2.5-1.5B Qwen2.5-1.5B-Instruct Qwen2.5-3B "
    "Qwen2.5-3B-Instruct Qwen2.5-7B Qwen2.5-7B-Instruct Qwen2.5-14B Qwen2.5-14B-Instruct Qwen2.5-32B "
    "Qwen2.5-32B-Instruct Qwen2.5-72B Qwen2.5-72B-Instruct QwQ-32B-Preview Qwen3-0.6B Qwen3-0.6B-Base Qwen3-1.7B "
    "Qwen3-4B Qwen3-8B Qwen3-14B",
    "allenai": "OLMo-2-0425-1B OLMo-2-1124-7B",
    "microsoft": "Phi-3-mini-4k-instruct phi-4",
    "HuggingFaceTB": "SmolLM-135M SmolLM-135M-Instruct SmolLM-360M SmolLM-360M-Instruct SmolLM-1.7B SmolLM-1.7B-Instruct "
    "SmolLM2-135M SmolLM2-135M-Instruct SmolLM2-360M SmolLM2-360M-Instruct SmolLM2-1.7B SmolLM2-1.7B-Instruct "
    "SmolLM3-3B SmolLM3-3B-Base",
}
# Name -> name of a repository above.
_OTHER_NAMES = {
    "gpt2-small": "gpt2",
    **dict.fromkeys(("distillgpt2", "distill-gpt2", "distil-gpt2", "gpt2-xs"), "distilgpt2"),
    **dict.fromkeys(("gpt-neox", "neox"), "gpt-neox-20b"),
    "pythia": "pythia-70m",
    "pythia-v0": "pythia-70m-v0",
    "meta-llama-2-70b-chat-hf": "Llama-2-70b-chat-hf",
    "CodeLlamallama-2-7b": "CodeLlama-7b-hf",
    "mistral-7b": "Mistral-7B-v0.1",
    "mistral-7b-instruct": "Mistral-7B-Instruct-v0.1",
    "qwen-32b-preview": "QwQ-32B-Preview",
    "olmo-2-1b": "OLMo-2-0425-1B",
    "olmo-2-7b": "OLMo-2-1124-7B",
    "phi-3": "Phi-3-mini-4k-instruct",
}
# Pythia models were once named by another count of their parameters.
_PYTHIA = {"70m": "19m", "160m": "125m", "410m": "350m", "1b": "800m", "1.4b": "1.3b", "2.8b": "2.7b", "6.9b": "6.7b",
           "12b": "13b"}


def _table() -> dict[str, str]:
    """Lower-case name -> hub id."""
    found = {name.lower(): f"{owner}/{name}" for owner, names in _REPOSITORIES.items() for name in names.split()}
    found |= {name.removesuffix("-hf"): repository for name, repository in found.items()}
    for size, old in _PYTHIA.items():
        for variant in ("", "-deduped", "-v0", "-deduped-v0"):
            repository = f"EleutherAI/pythia-{size}{variant}"
            found |= {f"pythia-{size}{variant}": repository, f"pythia-{old}{variant}": repository}
    found |= {f"pythia-125m-seed{i}": f"EleutherAI/pythia-160m-seed{i}" for i in (1, 2, 3)}
    stanford = _REPOSITORIES["stanford-crfm"].split()
    for index, name in enumerate(stanford):
        kind = f"{'small' if index < 5 else 'medium'}-{'abcde'[index % 5]}"
        found |= dict.fromkeys((f"stanford-gpt2-{kind}", f"gpt2-stanford-{kind}"), f"stanford-crfm/{name}")
    return found | {name.lower(): found[other.lower()] for name, other in _OTHER_NAMES.items()}


_TABLE = _table()


def hub_id(name: str) -> str:
    """The Hugging Face hub id `owner/name` of a model name of TransformerLens; any other name comes back unchanged.

    Known are only models of families that saejax computes: Gemma 1, OPT, GPT-J and mixtures of experts are not.
    """
    return _TABLE.get(name.lower(), name)
