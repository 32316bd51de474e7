//! Arrows between the top-level modules point one way: no two of them need each other, directly or through others.

#![allow(clippy::pedantic, reason = "tests read better with plain loops and format!; every other lint holds")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Arrows = BTreeMap<String, BTreeSet<String>>;

/// What each top-level module of `src` names of the others; tests and comments do not count.
fn arrows() -> Arrows {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut arrows = Arrows::new();
    let mut waiting = vec![src.clone()];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(std::fs::read_dir(&path).expect("list").map(|entry| entry.expect("entry").path()));
            continue;
        }
        let relative = path.strip_prefix(&src).expect("below src");
        let first = relative.iter().next().expect("a name").to_string_lossy();
        let module = first.trim_end_matches(".rs").to_owned();
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        let code = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        let names = code
            .split("crate::")
            .skip(1)
            .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default().to_owned());
        arrows.entry(module).or_default().extend(names);
    }
    let modules: BTreeSet<_> = arrows.keys().cloned().collect();
    for (module, to) in &mut arrows {
        to.retain(|name| name != module && modules.contains(name));
    }
    arrows
}

/// A way from `module` back to itself.
fn circle(arrows: &Arrows, module: &str) -> Option<Vec<String>> {
    let mut waiting = vec![vec![module.to_owned()]];
    let mut seen = BTreeSet::new();
    while let Some(way) = waiting.pop() {
        for next in &arrows[way.last().expect("never empty")] {
            let mut longer = way.clone();
            longer.push(next.clone());
            if next == module {
                return Some(longer);
            }
            if seen.insert(next.clone()) {
                waiting.push(longer);
            }
        }
    }
    None
}

#[test]
fn no_circle() {
    let arrows = arrows();
    assert!(arrows["provisioner"].contains("backend") && arrows["backend"].contains("daemon"), "{arrows:#?}");
    for module in arrows.keys() {
        assert_eq!(circle(&arrows, module), None);
    }
}

#[test]
fn a_circle_is_found() {
    let to = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
    let arrows = Arrows::from([("a".into(), to(&["b"])), ("b".into(), to(&["c"])), ("c".into(), to(&["b"]))]);
    assert_eq!(circle(&arrows, "a"), None);
    assert_eq!(circle(&arrows, "b").map(|way| way.join(" ")), Some("b c b".into()));
}

#[test]
fn store_and_backend_never_see_each_other() {
    let arrows = arrows();
    assert!(!arrows["store"].contains("backend") && !arrows["backend"].contains("store"));
}
