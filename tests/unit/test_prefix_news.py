"""A replica tells each ingress which beginnings it has taken from the others, so that it sends more of them there."""

from dataclasses import replace

from engine_fakes import request

from cluster.runtime.front import prefix_news
from cluster.runtime.front.prefix_balancer import DIGEST_BYTES, MAX_EXCESS, PrefixBalancer, digests_of
from cluster.runtime.front.prefix_news import MAX_NEWS, PrefixNews

FIRST, SECOND, THIRD = tuple(range(512)), tuple(range(1000, 1512)), tuple(range(2000, 2512))


def asked(ingress, prompt, **given):
    return replace(request("r", prompt), ingress=ingress, **given)


def known(news):
    return [[one[i : i + DIGEST_BYTES] for i in range(0, len(one), DIGEST_BYTES)] for one in news]


def introduced(*ingresses):
    """The news of a replica that has heard of these."""
    news = PrefixNews()
    for ingress in ingresses:
        news.taken(asked(ingress, [1]))
    return news


def test_each_ingress_hears_once_what_the_others_have_sent():
    news = introduced("a", "b", "c")
    assert news.taken(asked("a", FIRST)) == ()
    assert known(news.taken(asked("b", SECOND))) == [digests_of(FIRST)]
    assert known(news.taken(asked("c", THIRD))) == [digests_of(FIRST), digests_of(SECOND)]
    assert known(news.taken(asked("a", [1]))) == [digests_of(SECOND), digests_of(THIRD)]
    assert news.taken(asked("a", [1])) == ()


def test_an_answer_is_news_with_its_prompt_and_its_adapter():
    news = introduced("a", "b")
    one = asked("a", FIRST[:20], adapter="french", output_token_ids=(7, 8))
    news.taken(one)
    news.answered(one, [9] * 26)
    assert known(news.taken(asked("b", [1])))[1] == digests_of([*FIRST[:20], 7, 8, *[9] * 26], "french")


def test_what_nobody_would_look_for_is_no_news():
    """An ingress alone, or one of an older version; every row of a prompt; a short prompt; no answer."""
    alone = introduced("a")
    alone.taken(asked("a", FIRST))
    assert alone.taken(asked("b", [1])) == ()
    news = introduced("a", "b")
    assert news.taken(asked("", FIRST)) == ()
    news.taken(asked("a", FIRST, wants="token_logprobs"))
    news.taken(asked("a", FIRST[:15]))
    news.answered(asked("a", FIRST), [])
    assert news.taken(asked("b", [1])) == ()


def test_news_and_ingresses_are_bounded(monkeypatch):
    news = introduced("a", "b")
    for number in range(2 * MAX_NEWS):
        news.taken(asked("a", [number] * 16))
    assert known(news.taken(asked("b", [1])))[0] == digests_of([MAX_NEWS] * 16)
    monkeypatch.setattr(prefix_news, "MAX_INGRESSES", 4)
    for number in range(10):
        news.taken(asked(str(number), [1]))
    assert list(news._heard) == ["6", "7", "8", "9"]


def test_the_second_turn_of_a_conversation_finds_its_replica_through_another_ingress():
    """The other ingress has sent one short request to that replica meanwhile."""
    replicas = {name: PrefixNews() for name in ("x", "y", "z")}
    ingresses = [PrefixBalancer(name=name) for name in ("a", "b")]

    def send(ingress, prompt, replica, output=()):
        choice = ingress.choose(request("r", prompt))
        ingress.taken(choice, replica, replicas[replica].taken(choice.request))
        choice.output_token_ids += output
        ingress.ended(choice)
        replicas[replica].answered(choice.request, output)

    for ingress in ingresses:
        ingress.serve(replicas)
        send(ingress, THIRD[:20], "y")
    send(ingresses[0], FIRST, "y", output=[5] * 40)
    second = request("r", [*FIRST, *[5] * 40, 1])
    assert ingresses[1].choose(second).known == ()
    send(ingresses[1], THIRD[:20], "y")
    assert ingresses[1].choose(second).wanted == f"y+{MAX_EXCESS}"
    assert len(ingresses[1].choose(second).digests) == (512 + 40) // 16
