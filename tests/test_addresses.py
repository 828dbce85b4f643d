"""What people write into `BACKENDS`."""

from __future__ import annotations

import pytest

from trl_pool.addresses import BackendAddress, parse_backends
from trl_pool.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://n1:8000", "http://n1:8000"),
        ("n1:8000", "http://n1:8000"),
        ("n1", "http://n1:80"),
        ("http://n1", "http://n1:80"),
        ("http://n1:", "http://n1:80"),
        ("https://n1", "https://n1:443"),
        ("https://n1:8443", "https://n1:8443"),
        ("HTTP://N1.Example:8000", "http://n1.example:8000"),
        ("http://n1:8000/", "http://n1:8000"),
        ("http://n1:8000///", "http://n1:8000"),
        ("  http://n1:8000\t\n", "http://n1:8000"),
        ("http://n1:8000/team/Vllm/", "http://n1:8000/team/Vllm"),
        ("n1/prefix", "http://n1:80/prefix"),
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("[2001:DB8::1]:8000/x/", "http://[2001:db8::1]:8000/x"),
        ("http://[::1]", "http://[::1]:80"),
        ("http://n1:65535", "http://n1:65535"),
    ],
)
def test_an_address_is_normalised(text: str, url: str) -> None:
    address = BackendAddress.parse(text)
    assert address.url == url
    assert BackendAddress.parse(address.url) == address


def test_an_address_has_parts_and_a_name_without_scheme() -> None:
    address = BackendAddress.parse("https://[::1]:8000/a/b/")
    assert address == BackendAddress("https", "::1", 8000, "/a/b")
    assert address.name == "[::1]:8000/a/b"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no host"),
        ("   ", "no host"),
        ("http://", "no host"),
        ("http://:8000", "no host"),
        ("/path", "no host"),
        ("http://n1:8000/a b", "white space"),
        ("http://n 1:8000", "white space"),
        ("http://n1\n:8000", "white space"),
        ("http://n1:0", "port 0"),
        ("http://n1:65536", "0-65535"),
        ("http://n1:-1", "'-1'"),
        ("http://n1:80a", "'80a'"),
        ("n1:8000:9000", "'8000:9000'"),
        ("::1", "':1'"),
        ("http://[::1", "IPv6"),
        ("ftp://n1:8000", "scheme 'ftp'"),
        ("grpc://n1", "scheme 'grpc'"),
        ("http://n1:8000?x=1", "query"),
        ("http://n1:8000/a#b", "fragment"),
    ],
)
def test_a_wrong_address_is_refused_in_one_line_that_quotes_it_and_says_what_is_allowed(text: str, fault: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        BackendAddress.parse(text)
    message = str(caught.value)
    assert message.startswith(f"backend address {text!r}: ")
    assert fault in message
    assert "; allowed: http://" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "http://user:s3cret@n1:8000",
        "https://s3cret@n1",
        "user:s3cret@n1:8000",
        "http://user:s3cret@",
        "http://user:s3cret@n1:99999",
        "http://user:s3cret@n1:80a",
        "http://user:with@s3cret@n1:8000",
        "ftp://user:s3cret@n1",
        "http://:s3cret@n1:8000",
        "http://user:s3cret/x@n1:8000",
        "http://user:s3cret℀@n1:8000",
    ],
)
def test_a_password_is_refused_and_in_no_message(text: str) -> None:
    for parse in (BackendAddress.parse, parse_backends):
        with pytest.raises(ConfigurationError) as caught:
            parse(text)
        assert "s3cret" not in str(caught.value)
        assert "user:" not in str(caught.value)


def test_a_list_is_read_in_order() -> None:
    parsed = parse_backends("http://n2:8000,http://n1:8000,https://n3/x")
    assert [address.url for address in parsed] == ["http://n2:8000", "http://n1:8000", "https://n3:443/x"]


@pytest.mark.parametrize(
    "value",
    [
        "http://n1:8000,http://n2:8000,",
        ",http://n1:8000,,http://n2:8000,,",
        " http://n1:8000 , http://n2:8000 ",
        "http://n1:8000/,\n  http://n2:8000/",
        ["http://n1:8000", "http://n2:8000"],
        ["http://n1:8000,", " http://n2:8000"],
        ["http://n1:8000,http://n2:8000", ""],
        ("n1:8000", "n2:8000"),
    ],
)
def test_spaces_and_empty_items_are_ignored_and_several_strings_are_one_list(value: str | list[str]) -> None:
    assert [address.url for address in parse_backends(value)] == ["http://n1:8000", "http://n2:8000"]


@pytest.mark.parametrize("value", ["", "   ", ",", " , ,", [], [""], ["", ","]])
def test_no_address_at_all_is_refused(value: str | list[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"^no backend address in .*; allowed: URL\[,URL\.\.\.\]$"):
        parse_backends(value)


@pytest.mark.parametrize(
    "twice",
    [
        "http://n1:8000,http://n1:8000",
        "http://n1:8000,http://n2:8000,n1:8000/",
        "http://N1:8000,http://n1:8000",
        "http://n1,http://n1:80",
        "http://n1:8000/x,http://n1:8000/x/",
        "http://n1:443,https://n1",
        "http://[::1]:1,http://[::1]:1",
    ],
)
def test_a_server_that_is_listed_twice_is_refused(twice: str) -> None:
    with pytest.raises(ConfigurationError, match="listed twice; allowed: each server once"):
        parse_backends(twice)


def test_two_ports_or_two_prefixes_of_one_host_are_two_servers() -> None:
    names = [address.name for address in parse_backends("n1:8000,n1:8001,n1:8000/a,n1:8000/b")]
    assert names == ["n1:8000", "n1:8001", "n1:8000/a", "n1:8000/b"]


def test_one_wrong_address_among_good_ones_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="'n2:x'"):
        parse_backends("n1:8000,n2:x,n3:8000")


@pytest.mark.parametrize(
    "text", ["[::1]:8000,http://[0:0:0:0:0:0:0:1]:8000", "n1.:8000,n1:8000", "10.0.0.1:80,http://10.0.0.1"]
)
def test_one_server_in_two_spellings_is_found_out(text: str) -> None:
    with pytest.raises(ConfigurationError, match="listed twice"):
        parse_backends(text)


@pytest.mark.parametrize("text", ["http:/n1:8000", "http//n1:8000", "https:n1"])
def test_a_misspelt_scheme_is_no_host(text: str) -> None:
    with pytest.raises(ConfigurationError, match="allowed: http://"):
        parse_backends(text)
