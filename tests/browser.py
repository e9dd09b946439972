"""Debian's Chromium without a window, driven by Selenium, as a phone or a desktop, light or dark."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
"""Pixels across and down."""


class Browser:
    """A browser that shows one page at a time.

    Args:
        driver: Selenium's driver.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def _set_size(self, width: int, height: int, *, is_mobile: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def open(self, page: Path, size: str = "desktop", scheme: str = "light") -> None:
        """Open a page, and wait until its charts are drawn."""
        from selenium.webdriver.support.wait import WebDriverWait

        width, height = SIZES[size]
        self._set_size(width, height, is_mobile=size == "phone")
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": size == "phone"})
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
        self.driver.get(page.as_uri())
        WebDriverWait(self.driver, 20).until(
            lambda driver: driver.execute_script("return document.body.dataset.ready")
        )

    def print_media(self, width: int) -> None:
        """Show the page as it is printed, so many pixels across."""
        self._set_size(width, 1000)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """Return the first element that a CSS selector finds."""
        return self.driver.find_element("css selector", selector)

    def press(self, *keys: str) -> None:
        """Press keys, by their names in `selenium.webdriver.Keys`, where the focus is."""
        from selenium.webdriver import ActionChains, Keys

        actions = ActionChains(self.driver)
        for key in keys:
            actions.send_keys(getattr(Keys, key))
        actions.perform()

    def hover(self, element: Any, right: int = 0) -> None:
        """Point at an element, so many pixels to the right of its middle."""
        from selenium.webdriver import ActionChains

        script = """
            arguments[0].scrollIntoView({block: "center"});
            requestAnimationFrame(() => requestAnimationFrame(arguments[1]));"""
        self.driver.execute_async_script(script, element)
        ActionChains(self.driver).move_to_element_with_offset(element, right, 0).perform()

    def complaints(self) -> list[str]:
        """Return what the page has written to the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def overflowing(self) -> list[str]:
        """Return the elements that reach beyond the window's sides, but for those within a box that scrolls."""
        script = """
            const width = document.documentElement.clientWidth;
            const found = [];
            if (document.documentElement.scrollWidth > width) found.push("the page itself");
            for (const one of document.body.querySelectorAll("*")) {
                if (one.closest(".scroll, pre, .skip, caption, #tip, svg") || one.matches("script, style")) continue;
                const box = one.getBoundingClientRect();
                if (box.width && (box.right > width + 1 || box.left < -1)) found.push(one.outerHTML.slice(0, 100));
            }
            for (const one of document.querySelectorAll("svg text")) {
                const box = one.getBoundingClientRect();
                if (box.width && (box.right > width + 1 || box.left < -1)) found.push(one.outerHTML.slice(0, 100));
            }
            return found;"""
        return list(self.run(script))

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page, however long."""
        wanted = {"captureBeyondViewport": True, "format": "png"}
        picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", wanted)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture))


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a browser; nothing of it is left."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:  # Selenium would go and fetch them
        raise FileNotFoundError("chromium, chromedriver: not installed; apt-get install chromium chromium-driver")
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield Browser(session)
    finally:
        session.quit()
