"""The page in a real browser: Chromium and its driver, from the operating system's packages."""

from __future__ import annotations

import itertools
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serving.conftest import LIMITS, Served

from storm_jax.inference.generate import Sampling
from storm_jax.inference.predictor import Predictor
from storm_jax.inference.programs import Programs
from storm_jax.serve.app import make_app

pytestmark = pytest.mark.browser
PATIENCE = 60  # seconds
DESKTOP, PHONE = (1000, 1100), (390, 844)


class Page:
    """The page, by the ids of its elements."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def __getitem__(self, name: str):
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self[name].text

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, PATIENCE, 0.02).until(lambda _: condition())

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.wait(lambda: self.text("model") or self.text("error"))

    def choose(self, path: pathlib.Path) -> None:
        self["file"].send_keys(str(path))

    def ask(self, question: str) -> None:
        self["question"].clear()
        self["question"].send_keys(question)
        self["ask"].click()

    def problems(self) -> list[str]:
        """What the console says, but for answers of the server with an error status."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and "the server responded with" not in entry["message"]
        ]


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",  # it may run as root
        "--disable-dev-shm-usage",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver") or "")
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


@pytest.fixture(scope="module")
def endless(serve, make_service, trained_run) -> Served:
    """A server whose answers end at the limit of 24 tokens only."""
    predictor = Predictor(trained_run, num_workers=1)
    predictor._stop_ids = predictor._programs.stop_ids = (10**6,)
    service = make_service(predictor=predictor)
    return Served(serve(make_app(service)), service, predictor)


@pytest.fixture
def page(driver, endless) -> Iterator[Page]:
    driver.set_window_size(*DESKTOP)
    page = Page(driver)
    page.open(endless.url)
    yield page
    assert page.problems() == []


@pytest.fixture
def slowly(monkeypatch) -> None:
    decode = Programs.decode

    def slow(programs, *args):
        time.sleep(0.1)
        return decode(programs, *args)

    monkeypatch.setattr(Programs, "decode", slow)


def wordy_question(predictor: Predictor, clip: pathlib.Path) -> tuple[str, str]:
    """A question whose answer is not made of special tokens, which have no text."""
    watched = predictor.watch(clip)
    for number in range(100):
        question = f"What happens? {number}"
        answer = watched.answer(question, sampling=Sampling(LIMITS.new_tokens))
        if len(answer) > 30 and len(set(answer)) > 8:
            return question, answer
    raise AssertionError("no answer has text")


def test_an_answer_about_an_uploaded_video_arrives_in_pieces(page, endless, clip, slowly):
    question, answer = wordy_question(endless.predictor, clip)
    page.choose(clip)
    assert page["preview"].is_displayed() and clip.name in page.text("drop-text")
    page.driver.execute_script(
        """
        window.seen = [];
        new MutationObserver(() => seen.push(document.getElementById("answer").textContent))
            .observe(document.getElementById("answer"), {childList: true, characterData: true, subtree: true});
        """
    )
    page.ask(question)
    page.wait(lambda: "tokens in" in page.text("stats"))
    seen = [text for text in page.driver.execute_script("return seen") if text]
    assert len(seen) >= 5
    assert all(later.startswith(text) for text, later in itertools.pairwise(seen))
    assert seen[-1] == answer
    assert page.text("stats").startswith("16 visual of")
    page.wait(lambda: len(page["seen"].find_elements(By.TAG_NAME, "figure")) == 8)
    captions = [each.text for each in page["seen"].find_elements(By.TAG_NAME, "figcaption")]
    assert captions[0] == "0.00 s" and len(set(captions)) == 8


def test_frames_and_compression_are_those_that_were_chosen(page, clip):
    page.choose(clip)
    assert page["frames"].get_attribute("value") == page["frames"].get_attribute("max") == "8"
    page["frames"].clear()
    page["frames"].send_keys("4")
    page["compression"].send_keys("4x")
    page.ask("What?")
    page.wait(lambda: "tokens in" in page.text("stats"))
    assert page.text("stats").startswith("4 visual of")  # one group
    page.wait(lambda: len(page["seen"].find_elements(By.TAG_NAME, "figure")) == 4)


def test_stop_ends_an_answer(page, endless, clip, slowly):
    page.choose(clip)
    page.ask("What?")
    page.wait(lambda: page.text("answer"))
    assert not page["ask"].is_enabled()
    page["stop"].click()
    page.wait(lambda: "stopped after" in page.text("stats"))
    page.wait(lambda: endless.service.engine.running == 0)
    assert page["ask"].is_enabled() and not page["stop"].is_enabled()


def test_a_broken_file_is_an_error_that_is_shown(page, clip, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing" * 100)
    page.choose(broken)
    page.ask("What?")
    page.wait(lambda: page.text("error"))
    assert "is unreadable" in page.text("error")
    page.choose(clip)
    page.ask("What?")
    page.wait(lambda: "tokens in" in page.text("stats"))
    assert page.text("error") == ""


def test_it_works_with_the_keyboard(page):
    page["tab-file"].send_keys(Keys.ARROW_RIGHT)
    assert page["live-panel"].is_displayed() and not page["file-panel"].is_displayed()
    page["tab-live"].send_keys(Keys.ARROW_LEFT)
    page["question"].send_keys("Hello", Keys.SHIFT, Keys.ENTER)
    page["question"].send_keys(Keys.ENTER)
    page.wait(lambda: "tokens in" in page.text("stats"))
    assert "0 visual of" in page.text("stats")


def test_the_webcam_is_asked_while_it_runs(page):
    page["tab-live"].click()
    page.ask("What?")
    assert "start the camera first" in page.text("error")
    page.driver.execute_script("document.getElementById('fps').value = 5")
    page["start"].click()
    page.wait(lambda: "frames in" in page.text("live-stats"))
    page.ask("What?")
    page.wait(lambda: "s in all" in page.text("stats"))
    assert page.text("answer") and page.text("error") == ""
    page["start"].click()
    page.wait(lambda: page.text("start") == "Start the camera")


def test_a_phone_shows_everything_without_scrolling_sideways(page, clip):
    page.driver.set_window_size(*PHONE)
    page.choose(clip)
    page.ask("What?")
    page.wait(lambda: "tokens in" in page.text("stats"))
    width = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = page.driver.execute_script(width)
    assert scroll <= client


def test_an_api_key_is_asked_for(driver, serve, make_service):
    page = Page(driver)
    page.open(serve(make_app(make_service(), api_key="secret")))
    assert "API key" in page.text("error")
    page["key"].send_keys("secret", Keys.ENTER)
    page.wait(lambda: page.text("model"))
    page.ask("Hello")
    page.wait(lambda: "tokens in" in page.text("stats"))


def test_nothing_is_loaded_from_elsewhere(page):
    urls = page.driver.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert len(urls) >= 3
    origin = page.driver.execute_script("return location.origin")
    assert all(url.startswith((origin, "blob:", "data:")) for url in urls)
