import os

# Nothing is told to anybody, and nothing fetched.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "OPENAI_AGENTS_DISABLE_TRACING": "1",
               "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false", "DO_NOT_TRACK": "1", "OPENAI_API_KEY": "none",
               "HF_HUB_OFFLINE": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__"}

import pytest

from tests.serving.process import serving


@pytest.fixture(scope="session")
def url():
    with serving("--alias", "gpt-4o", "--max-denoising-steps", "4",
                 program="from tests.clients.scripted import main; main()") as (found, _):
        yield f"{found}/v1"
