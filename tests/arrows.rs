//! Arrows between modules point one way. In every folder of `src`, no two of the modules that lie side by side need each other, directly or
//! through others; a folder counts as one with all that is in it, and what a folder's `mod.rs` passes on counts as what it is of.

#![allow(clippy::pedantic, reason = "tests read better with plain loops and format!; every other lint holds")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A module's names from the crate's root down.
type Module = Vec<String>;
type Arrows = BTreeMap<String, BTreeSet<String>>;

/// The code of each module: no comments and no tests.
fn sources() -> BTreeMap<Module, String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut found, mut tests) = (BTreeMap::new(), BTreeSet::new());
    let mut waiting = vec![src.clone()];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(std::fs::read_dir(&path).expect("list").map(|entry| entry.expect("entry").path()));
            continue;
        }
        let relative = path.strip_prefix(&src).expect("below src").with_extension("");
        let mut module: Module = relative.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        module.pop_if(|last| ["mod", "lib", "main"].contains(&last.as_str()));
        let (mut code, mut is_test) = (String::new(), false);
        for line in std::fs::read_to_string(&path).unwrap_or_default().lines() {
            let line = line.trim();
            match line.strip_prefix("mod ").filter(|_| is_test) {
                Some(name) if name.ends_with(';') => {
                    let name = name.trim_end_matches(';').to_owned();
                    tests.insert([&module[..], &[name]].concat());
                }
                Some(_) => break,
                None => {}
            }
            is_test = line == "#[cfg(test)]" || is_test && line.starts_with("#[");
            if !line.starts_with("//") {
                code.push_str(line);
                code.push('\n');
            }
        }
        found.entry(module).or_insert_with(String::new).push_str(&code);
    }
    found.retain(|module, _| !(1..=module.len()).any(|n| tests.contains(&module[..n])));
    found
}

/// `a::{b, c::{d, e as f}}` as `a::b`, `a::c::d` and `a::c::e`.
fn expand(tree: &str, before: &[String], paths: &mut Vec<Module>) {
    let (mut depth, mut from, mut parts) = (0, 0, Vec::new());
    for (at, c) in tree.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&tree[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&tree[from..]);
    for part in parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty()) {
        let (path, inner) = part.split_once('{').map_or((part, None), |(path, rest)| (path, Some(rest)));
        let path = path.split(" as ").next().expect("one part");
        let mut whole = before.to_vec();
        whole.extend(path.split("::").map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned));
        match inner {
            Some(rest) => expand(rest.strip_suffix('}').unwrap_or(rest), &whole, paths),
            None => paths.push(whole),
        }
    }
}

/// The paths of `use` lines, and whether others may use what they name through this module; then those in the code itself.
fn paths(code: &str) -> Vec<(Module, bool)> {
    let mut all = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let line = code[..at].rfind('\n').map_or(0, |at| at + 1);
        let before = &code[line..at];
        if before.is_empty() || before.starts_with("pub") {
            let mut found = Vec::new();
            expand(code[at + 4..].split(';').next().expect("one part"), &[], &mut found);
            all.extend(found.into_iter().map(|path| (path, !before.is_empty())));
        }
    }
    let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for word in code.split(|c: char| !is_name(c)) {
        // A child module's name, too: what is a type's name is no module.
        if word.contains("::") {
            all.push((word.split("::").map(str::to_owned).filter(|name| !name.is_empty()).collect(), false));
        }
    }
    all
}

/// Where a path that is written in `module` leads, from the root.
fn absolute(module: &[String], path: &[String]) -> Module {
    let (mut at, mut rest) = (module.to_vec(), path);
    while let Some((first, more)) = rest.split_first() {
        match first.as_str() {
            "crate" => at.clear(),
            "super" => drop(at.pop()),
            "self" => {}
            _ => break,
        }
        rest = more;
    }
    at.extend_from_slice(rest);
    at
}

/// For each folder, what its modules name of one another.
fn arrows(sources: &BTreeMap<Module, String>) -> BTreeMap<Module, Arrows> {
    let named: BTreeMap<&Module, Vec<(Module, bool)>> = sources.iter().map(|(m, code)| (m, paths(code))).collect();
    let passed_on: BTreeMap<Module, Module> = named
        .iter()
        .flat_map(|(module, paths)| {
            paths.iter().filter(|(_, is_passed)| *is_passed).map(move |(path, _)| (module, path))
        })
        .filter_map(|(module, path)| {
            Some(([module, &path[path.len() - 1..]].concat(), absolute(module, path))).filter(|_| path.len() > 1)
        })
        .collect();
    let mut all: BTreeMap<Module, Arrows> = BTreeMap::new();
    for module in sources.keys().filter(|module| !module.is_empty()) {
        all.entry(module[..module.len() - 1].to_vec())
            .or_default()
            .entry(module[module.len() - 1].clone())
            .or_default();
    }
    for (module, paths) in named {
        for (path, _) in paths {
            let mut to = absolute(module, &path);
            // What it is of, through every module that passes it on.
            for _ in 0..8 {
                match (1..=to.len()).rev().find_map(|n| Some((n, passed_on.get(&to[..n])?))) {
                    Some((n, real)) => to = [real, &to[n..]].concat(),
                    None => break,
                }
            }
            while !to.is_empty() && !sources.contains_key(&to) {
                to.pop();
            }
            let same = module.iter().zip(&to).take_while(|(a, b)| a == b).count();
            if same < module.len() && same < to.len() {
                let folder = all.entry(module[..same].to_vec()).or_default();
                folder.entry(module[same].clone()).or_default().insert(to[same].clone());
            }
        }
    }
    all
}

/// A way from `module` back to itself.
fn circle(arrows: &Arrows, module: &str) -> Option<Vec<String>> {
    let mut waiting = vec![vec![module.to_owned()]];
    let mut seen = BTreeSet::new();
    while let Some(way) = waiting.pop() {
        for next in arrows.get(way.last().expect("never empty")).into_iter().flatten() {
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
    let all = arrows(&sources());
    let top = &all[&Vec::new()];
    assert!(top["provisioner"].contains("backend") && top["backend"].contains("daemon"), "{top:#?}");
    assert!(all.len() > 15, "{} folders were looked at", all.len());
    for (folder, arrows) in &all {
        for module in arrows.keys() {
            assert_eq!(circle(arrows, module).map(|way| way.join(" -> ")), None, "in {}", folder.join("::"));
        }
    }
}

#[test]
fn a_circle_is_found() {
    let source = |name: &str, code: &str| (name.split("::").map(str::to_owned).collect::<Module>(), code.to_owned());
    let sources = BTreeMap::from([
        source("top", "pub use low::Thing;\n"),
        source("top::low", "use super::{other, lower::{Deep, Deeper as D}};\n"),
        source("top::lower", "fn f() { crate::top::other::call() }\n"),
        // By the name that the folder passes on.
        source("top::other", "pub(crate) use crate::top::Thing;\n"),
        source("beside", "use crate::top::{self, lower};\n"),
    ]);
    let all = arrows(&sources);
    let inside = &all[&vec!["top".to_owned()]];
    assert_eq!(circle(inside, "lower").map(|way| way.join(" ")), Some("lower other low lower".into()));
    assert_eq!(all[&Vec::new()]["beside"], BTreeSet::from(["top".to_owned()]));
    assert_eq!(circle(&all[&Vec::new()], "beside"), None);
}

#[test]
fn store_and_backend_never_see_each_other() {
    let all = arrows(&sources());
    let top = &all[&Vec::new()];
    assert!(!top["store"].contains("backend") && !top["backend"].contains("store"));
}
