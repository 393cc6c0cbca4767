"""Which hosts rules cover."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openinteractions.errors import Invalid
from openinteractions.sandbox.egress import hosts
from openinteractions.sandbox.egress.policy import (
    Blocked,
    Policy,
    Reach,
    Rule,
    check_network,
    matches,
)

OPEN = Reach()
names = st.from_regex(r"[a-z]([a-z0-9-]{0,5}[a-z0-9])?(\.[a-z]{1,4}){0,4}", fullmatch=True)


def built(*entries, default=OPEN, ceiling=OPEN) -> Policy:
    return Policy({"allowlist": list(entries)}, default=default, ceiling=ceiling)


@pytest.mark.parametrize(
    ("domain", "host", "covered"),
    [
        ("example.com", "example.com", True),
        ("EXAMPLE.com.", "example.com", True),
        ("example.com", "www.example.com", False),
        ("example.com", "evil-example.com", False),
        ("example.com", "example.com.evil.net", False),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "evilexample.com", False),
        ("*.example.com", "a.example.com.evil.net", False),
        ("*.com", "example.com", True),
        ("*", "anything.at.all", True),
        ("*", "8.8.8.8", True),
        ("*", "2606:4700::1111", True),
        ("8.8.8.8", "8.8.8.8", True),
        ("*.8", "8.8.8.8", False),
        ("[2606:4700:0::1111]", "2606:4700::1111", True),
        ("2606:4700::1111", "2606:4700::1111", True),
        ("bücher.de", "xn--bcher-kva.de", True),
        ("*.BÜCHER.de", "a.xn--bcher-kva.de", True),
        ("straße.de", "xn--strae-oqa.de", True),
        ("_dmarc.a_b.com", "_dmarc.a_b.com", True),
    ],
)
def test_a_domain_covers(domain: str, host: str, covered: bool):
    assert matches([domain], host) == covered


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("EXAMPLE.com", "example.com"), ("example.com.", "example.com"), ("a..b", None),
        ("", None), (".", None), (".a.com", None), ("a.com..", None), ("-a.com", None),
        ("a" * 64 + ".com", None), ("a." * 127 + "com", None), ("a b.com", None),
        ("a\0.com", None), ("user@a.com", None), ("a.com:80", None), ("a/b", None),
        ("2130706433", None), ("0x7f000001", None), ("0x7f.1", None), ("127.1", None),
        ("0177.0.0.1", None), ("127.0.0.01", None), ("1.2.3.4.", None), ("a.1", None),
        ("a.0x", None), ("\uff11\uff12\uff17.0.0.1", "127.0.0.1"), ("127。0。0。1", "127.0.0.1"),
        ("[::1]", "::1"), ("[1.2.3.4]", None), ("[fe80::1%25lo]", None), ("fe80::1%lo", None),
        ("[::ffff:10.0.0.1]", "::ffff:10.0.0.1"), ("[::1", None), ("*", None),
    ],
)  # fmt: skip
def test_hosts_have_one_spelling(written: str, normal: str | None):
    found = hosts.normal(written)
    assert found == normal or (found == "::ffff:a00:1" and normal == "::ffff:10.0.0.1")


@settings(deadline=None)
@given(st.text(max_size=40) | names)
def test_the_one_spelling_is_stable(text: str):
    found = hosts.normal(text)
    if found is not None:
        assert hosts.normal(found) == found
        assert found.isascii()


@settings(deadline=None)
@given(names, names)
def test_a_wildcard_covers_just_what_is_below(name: str, label: str):
    below = f"{label}.{name}"
    if hosts.normal(below) is None or hosts.normal(name) is None:
        return
    assert matches([f"*.{name}"], below)
    assert not matches([f"*.{name}"], name)
    assert not matches([name], below)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"a.com", ("a.com", 80)), (b"a.com:8080", ("a.com", 8080)), (b"[::1]:1", ("::1", 1)),
        (b"a.com:", None), (b"a.com:0", None), (b"a.com:65536", None),
        (b"a.com:080", ("a.com", 80)),
        (b"u@a.com", None), (b"a.com:1:2", None), (b"::1", None), (b"a.com/", None), (b"", None),
        (b":80", None), (b"a.com\\", None), (b"\xc3\xa4.com", None), (b"a.com:+1", None),
        (b"a.com:\xd9\xa1", None), (b"a.com#b", None),
    ],
)  # fmt: skip
def test_authorities(text: bytes, found):
    assert hosts.authority(text, 80) == found


def test_the_most_specific_rule_wins():
    rules = built(
        {"domain": "*", "credential": "any"},
        {"domain": "*.example.com", "credential": "wide"},
        {"domain": "*.b.example.com", "credential": "narrow"},
        {"domain": "a.b.example.com", "credential": "exact"},
    )
    assert rules.decide("a.b.example.com").credential == "exact"
    assert rules.decide("x.b.example.com").credential == "narrow"
    assert rules.decide("b.example.com").credential == "wide"
    assert rules.decide("example.com").credential == "any"
    assert rules.decide("8.8.8.8").credential == "any"


def test_transforms_are_one_map_and_two_entries_for_one_domain_act_as_one():
    rules = built(
        {"domain": "a.com", "transform": [{"X-A": "1"}, {"x-a": "2", "X-B": "3"}]},
        {"domain": "A.com", "credential": "c", "transform": {"X-b": "4"}},
    )
    assert rules.decide("a.com") == Rule("a.com", "c", (("x-a", "2"), ("X-b", "4")))


@pytest.mark.parametrize("network", ["disabled", {"allowlist": "disabled"}, {"allowlist": []}])
def test_disabled_reaches_nothing_and_says_so(network):
    rules = Policy(network, default=OPEN, ceiling=OPEN)
    with pytest.raises(Blocked, match=r"no network access.*network\.allowlist"):
        rules.decide("a.com")


@pytest.mark.parametrize("network", [None, {}])
def test_nothing_said_takes_the_default(network):
    rules = Policy(network, default=Reach("allowlist", ["a.com"]), ceiling=OPEN)
    assert rules.decide("a.com").domain == "a.com"
    with pytest.raises(Blocked, match=r"b\.com is not on .*\(a\.com\)"):
        rules.decide("b.com")
    assert Policy(network, default=OPEN, ceiling=OPEN).decide("b.com").domain == "*"
    with pytest.raises(Blocked):
        Policy(network, default=Reach("disabled"), ceiling=OPEN).decide("b.com")


def test_nothing_exceeds_the_ceiling():
    ceiling = Reach("allowlist", ["*.a.com", "b.com"])
    rules = built({"domain": "*", "credential": "c"}, ceiling=ceiling)
    assert rules.decide("x.a.com").credential == "c"
    with pytest.raises(Blocked, match=r"its operator.*sandbox\.ceiling"):
        rules.decide("a.com")
    with pytest.raises(Blocked):
        Policy(None, default=OPEN, ceiling=Reach("disabled")).decide("b.com")


def test_any_host_is_fine_only_where_everything_is_open():
    free = Policy(None, default=OPEN, ceiling=OPEN)
    assert free.is_any_host_fine(free.decide("a.com"))
    capped = Policy(None, default=OPEN, ceiling=Reach("allowlist", ["a.com"]))
    assert not capped.is_any_host_fine(capped.decide("a.com"))
    listed = built({"domain": "a.com"})
    assert not listed.is_any_host_fine(listed.decide("a.com"))


@pytest.mark.parametrize(
    ("domain", "why"),
    [
        ("https://a.com", "is a URL"), ("a.com/x", "is a URL"), ("a.com:443", "name a port"),
        ("[::1]:443", "name a port"), ("a.*.com", "wildcard"), ("*a.com", "wildcard"),
        ("*.*", "wildcard"), ("**", "wildcard"), ("*.1.2.3.4", "not a host"), ("", "not a host"),
        ("a b", "not a host"), ("2130706433", "not a host"), ("*.", "not a host"),
    ],
)  # fmt: skip
def test_malformed_domains_are_named(domain: str, why: str):
    with pytest.raises(Invalid, match=rf"^network\.allowlist\[1\]\.domain: .*{why}"):
        check_network({"allowlist": [{"domain": "ok.com"}, {"domain": domain}]}, OPEN)


@pytest.mark.parametrize(
    "headers",
    [
        {"X A": "1"}, {"": "1"}, {"X:": "1"}, {"X-A": "1\r\nX-B: 2"}, {"X-A": "\0"},
        {"Host": "x"}, {"content-length": "1"}, {"Transfer-Encoding": "chunked"},
        {"Connection": "x"}, {"Proxy-Authorization": "x"}, [{"X-A": "1"}, {"X-A": "\x7f"}],
    ],
)  # fmt: skip
def test_headers_that_cannot_be_set_are_named(headers):
    with pytest.raises(Invalid, match=r"^network\.allowlist\[0\]\.transform: "):
        check_network({"allowlist": [{"domain": "a.com", "transform": headers}]}, OPEN)


def test_a_value_in_a_message_is_not_a_secret_shown():
    with pytest.raises(Invalid) as caught:
        check_network({"allowlist": [{"domain": "a.com", "transform": {"X": "hush\n"}}]}, OPEN)
    assert "hush" not in caught.value.message


def test_two_credentials_for_one_domain_are_refused():
    entries = [{"domain": "a.com", "credential": "x"}, {"domain": "A.com.", "credential": "y"}]
    with pytest.raises(Invalid, match=r"allowlist\[1\]\.credential"):
        check_network({"allowlist": entries}, OPEN)


@pytest.mark.parametrize(
    ("domain", "fine"),
    [
        ("*", True), ("a.com", False), ("x.a.com", True), ("*.a.com", True), ("*.com", True),
        ("*.x.a.com", True), ("c.com", False), ("b.com", True), ("*.b.com", False),
    ],
)  # fmt: skip
def test_an_entry_wholly_above_the_ceiling_is_refused(domain: str, fine: bool):
    ceiling = Reach("allowlist", ["*.a.com", "b.com"])
    network = {"allowlist": [{"domain": domain}]}
    if fine:
        check_network(network, ceiling)
    else:
        with pytest.raises(Invalid, match=r"allowlist\[0\]\.domain: .*operator"):
            check_network(network, ceiling)


@pytest.mark.parametrize("network", [None, "disabled", {}, {"allowlist": "disabled"}])
def test_values_without_entries_are_fine(network):
    check_network(network, Reach("disabled"))


def test_a_malformed_setting_is_an_error():
    with pytest.raises(ValueError, match="port"):
        Reach("allowlist", ["a.com:80"])
