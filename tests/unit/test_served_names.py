"""A model's further names: on the command line, in the configuration, and over HTTP."""

import asyncio

from http_tools import MODEL, Front
from serving_fakes import write_tokenizer

from cluster import cli
from cluster.cli.arguments import cluster_config
from cluster.serving.text.tokenizer import Tokenizer

BODY = {"prompt": "a", "max_tokens": 1}


def test_the_first_of_several_names_is_the_models_and_the_others_are_further_ones(tmp_path):
    """As vLLM's option of the same name has them."""
    args = cli._parser().parse_args(["serve", "demo", "--served-model-name", "one", "OWNER/two", "three"])
    config = cluster_config(args, "demo")
    assert (config.model_id, config.aliases) == ("one", ("OWNER/two", "three"))
    config = cluster_config(cli._parser().parse_args(["serve", "demo"]), "demo")
    assert (config.model_id, config.aliases) == ("", ())


def test_answers_have_the_first_name_and_every_name_is_listed(tmp_path):
    front = Front(Tokenizer(write_tokenizer(tmp_path)), aliases=("OWNER/two", "three"))

    async def run():
        for name in (MODEL, "OWNER/two", "three"):
            answer = await front.post("/v1/completions", {**BODY, "model": name})
            assert answer.json()["model"] == MODEL
            assert (await front.get(f"/v1/models/{name}")).json()["id"] == name
        listed = (await front.get("/v1/models")).json()["data"]
        assert [(one["id"], one["root"]) for one in listed] == [(n, MODEL) for n in (MODEL, "OWNER/two", "three")]
        assert (await front.post("/v1/completions", {**BODY, "model": "OWNER"})).status_code == 404

    asyncio.run(run())
