"""Packaging: everything is read from settings.ini, nbdev's single place for names, versions and requirements."""
from configparser import ConfigParser
from pathlib import Path
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = root / "README.md"

class WithNotebooks(build_py):
    "Copies the notebooks that `aasp run` and `aasp dashboards` open into the package: nbs/ stays their only source."
    def run(self):
        super().run()
        if self.editable_mode: return  # a checkout is beside the package
        for kind in ("runs", "dashboards", "lessons"):
            target = Path(self.build_lib) / cfg["lib_path"] / "assets" / "notebooks" / kind
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((root / "nbs" / kind).glob("*.ipynb")): shutil.copy(path, target)


setup(
    cmdclass={"build_py": WithNotebooks},
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    packages=find_packages(include=["aasp_nb", "aasp_nb.*"]), include_package_data=True,
    package_data={cfg["lib_path"]: ["py.typed", "assets/*", "assets/*/*", "assets/*/*/*"]},  # checkpoints and example results
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("lab", "export", "docs", "dev")},
    entry_points={"console_scripts": cfg.get("console_scripts", "").split(),
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
