"""The report read back as an HTML parser sees it."""

import base64
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

VOID = {"meta", "img", "br", "hr", "link", "input", "source"}


class Page(HTMLParser):
    """Checks that elements nest and collects what the tests ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.attributes if name == tag]

    def images(self, kind):
        """The attributes of every <img> whose picture is of a kind, "png" or "svg+xml"."""
        return [image for image in self.all("img") if image["src"].startswith(f"data:image/{kind};base64,")]

    def needs_nothing_else(self):
        """Asserts that neither the page nor a picture in it refers to another file or runs a script."""
        assert not {"script", "link", "iframe", "object", "base", "a"} & set(self.tags)
        for _, attributes in self.attributes:
            assert "href" not in attributes
            assert not any(name.startswith("on") for name in attributes)
            for name in ("src", "srcset"):
                uri = attributes.get(name, "data:")
                assert uri.startswith("data:"), uri
                if uri.startswith("data:image/svg+xml"):
                    for element in ET.fromstring(base64.b64decode(uri.partition(",")[2])).iter():
                        assert element.tag.rpartition("}")[2] not in ("script", "image", "foreignObject")
                        links = [v for k, v in element.attrib.items() if k.rpartition("}")[2] in ("href", "src")]
                        assert all(link.startswith("#") for link in links)
                        assert "url(http" not in str(element.attrib)

    def is_described(self):
        """Asserts that every picture has a text in its place and every label something to point to."""
        assert all(image["alt"].strip() for image in self.all("img"))
        ids = [attributes["id"] for _, attributes in self.attributes if "id" in attributes]
        assert len(ids) == len(set(ids))
        labels = {a["aria-labelledby"] for _, a in self.attributes if "aria-labelledby" in a}
        assert labels <= set(ids)
        assert self.tags.count("caption") == self.tags.count("table")
        assert self.tags.count("figcaption") == self.tags.count("figure")


@pytest.fixture(scope="session")
def parse() -> Callable[[str], Page]:
    """parse(html): the page, its elements checked to nest."""
    return Page
