import pytest

from tests.serving.process import serving

# Nothing is told to anybody, and nothing fetched.
PRIVATE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "DO_NOT_TRACK": "1",
    "OPENAI_API_KEY": "none",
    "HF_HUB_OFFLINE": "1",
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
}


@pytest.fixture(scope="session", autouse=True)
def private():
    """Before a client is imported; other tests keep their own environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PRIVATE.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def url(private):
    with serving(
        "--alias",
        "gpt-4o",
        "--max-denoising-steps",
        "4",
        program="from tests.clients.scripted import main; main()",
    ) as (found, _):
        yield f"{found}/v1"
