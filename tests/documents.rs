//! Every command block of the README and of docs/ is run: as root and as an ordinary user, each document from nothing, its blocks in
//! order. Prints how many ran and how many passed.
//!
//! A block is what stands between fences with the word `sh`. More words of the fence, which no reader sees:
//!
//! * `root`, `user`: only root, or only an ordinary user, runs it;
//! * `not-run="why"`: this test cannot run it. It is listed with its reason.
//!
//! A comment `<!-- run COMMANDS -->` is run and not counted: what the reader is taken to have already. A block of `toml` must be a configuration
//! that fsprov takes. A document also fails when a link leads to no file or heading of ours, or when a block says no language.
//!
//! `cargo test --test documents -- NAME`; see tests/common/harness.rs for FSPROV_TEST_MUST_RUN and FSPROV_TEST_KEEP.

#![allow(clippy::pedantic, reason = "tests read better with plain loops and format!; every other lint holds")]

#[allow(dead_code, reason = "what the suites need of it is more")]
mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::ExitCode;

use common::harness::on;
use common::lane::Half;
use common::{Case, Enter, Need, Stage, harness, images, stage};
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

const NEEDS: &[Need] = &[
    Need::Minbase,
    Need::DevFuse,
    Need::Tool("bwrap"),
    Need::Tool("gpg"),
    Need::Tool("docker-registry"),
    Need::Tool("skopeo"),
];

macro_rules! documents {
    ($($case:ident: $path:literal),* $(,)?) => {
        /// Each document's text: the ordinary user of a test may not be able to read the checkout.
        const DOCUMENTS: &[(&str, &str)] = &[$(($path, include_str!(concat!("../", $path)))),*];
        const CASES: &[Case] = &[$(Case::needing(
            stringify!($case), on::once_each, NEEDS, |stage| run($path, stage),
        )),*];
    };
}
documents! {
    readme: "README.md",
    contributing: "CONTRIBUTING.md",
    security_policy: "SECURITY.md",
    changelog: "CHANGELOG.md",
    agents_and_systemd: "docs/agents-and-systemd.md",
    architecture: "docs/architecture.md",
    benchmarks: "docs/benchmarks.md",
    guide: "docs/guide.md",
    images: "docs/images.md",
    kubernetes_and_docker: "docs/kubernetes-and-docker.md",
    limits: "docs/limits.md",
    run: "docs/run.md",
    security: "docs/security.md",
    volumes: "docs/volumes.md",
    writable: "docs/writable.md",
}

/// Names a checkout whose documents are read instead: for one who writes them, and does not want to build each time.
const CHECKOUT: &str = "FSPROV_TEST_DOCUMENTS";

fn text(path: &str) -> String {
    match std::env::var_os(CHECKOUT) {
        Some(dir) => fs::read_to_string(Path::new(&dir).join(path)).expect("read a document"),
        None => DOCUMENTS.iter().find(|(name, _)| *name == path).expect("a document").1.into(),
    }
}

/// Who a block is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Anyone,
    Root,
    User,
}

#[derive(Debug)]
enum Use {
    /// A block of commands.
    Run(Who),
    /// Commands that a reader does not see.
    SetUp,
    /// A configuration file.
    Configuration,
    /// Commands that this test cannot run, and why.
    NotRun(String),
}

#[derive(Debug)]
struct Block {
    line: usize,
    text: String,
    how: Use,
}

/// What a document says, as far as it can be tested.
#[derive(Debug, Default)]
struct Document {
    blocks: Vec<Block>,
    /// (line, target)
    links: Vec<(usize, String)>,
    /// As they are linked to.
    headings: BTreeSet<String>,
    faults: Vec<String>,
}

fn main() -> ExitCode {
    // A case's own process, or the copy of this program that root runs as the test's user.
    if harness::is_child() {
        return half(Half::Unprivileged);
    }
    if let Some(code) = run_again() {
        return code;
    }
    let documents = check_documents();
    let wrong: Vec<_> =
        documents.iter().flat_map(|(path, d)| d.faults.iter().map(move |f| format!("{path}:{f}"))).collect();
    let listed = documents.iter().flat_map(|(path, d)| d.blocks.iter().map(move |b| (path, b)));
    for (path, block) in listed {
        if let Use::NotRun(why) = &block.how {
            say(&format!("documents: not run here: {path}:{}: {why}", block.line));
        }
    }
    if !wrong.is_empty() {
        say(&format!("documents: these are wrong:\n  {}", wrong.join("\n  ")));
        return ExitCode::FAILURE;
    }
    let halves: &[Half] = if rustix::process::geteuid().is_root() {
        &[Half::Privileged, Half::Unprivileged]
    } else {
        &[Half::Unprivileged]
    };
    let all: Vec<_> = halves.iter().map(|which| half(*which)).collect();
    all.into_iter().find(|code| *code != ExitCode::SUCCESS).unwrap_or(ExitCode::SUCCESS)
}

/// Where the cases' directories are made (tests/common/stage.rs), and how many seconds one may take (tests/common/harness.rs).
const PLACE: &str = "FSPROV_TEST_TMP";
const LIMIT: &str = "FSPROV_TEST_LIMIT";
/// Set in the copy of this program that has them.
const AGAIN: &str = "FSPROV_TEST_AGAIN";
/// What two documents need at the same time, and more.
const ROOM: u64 = 4 << 30;
/// One downloads Debian's package lists, which took 77 s on a busy machine.
const LIMIT_S: &str = "720";

/// Most documents import Debian: on a busy disk that takes minutes. So this program runs itself again, with a place in memory if there
/// is one, and with time to download.
fn run_again() -> Option<ExitCode> {
    if std::env::var_os(AGAIN).is_some() {
        return None;
    }
    let mut again = std::process::Command::new(std::env::current_exe().ok()?);
    again.args(std::env::args_os().skip(1)).env(AGAIN, "1");
    let memory = rustix::fs::statvfs("/dev/shm").ok().filter(|memory| {
        memory.f_bavail * memory.f_frsize > ROOM && !memory.f_flag.contains(rustix::fs::StatVfsMountFlags::NOEXEC)
    });
    if memory.is_some() && std::env::var_os(PLACE).is_none() {
        again.env(PLACE, "/dev/shm");
    }
    if std::env::var_os(LIMIT).is_none() {
        again.env(LIMIT, LIMIT_S);
    }
    let status = again.status().ok()?;
    Some(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

/// Run every document as one of the two, and sum up.
fn half(half: Half) -> ExitCode {
    let code = harness::main(half, CASES.iter().collect());
    let notes = harness::notes();
    if !notes.is_empty() {
        let sum = |word: usize| -> usize {
            notes.iter().filter_map(|note| note.split(' ').nth(word)?.parse::<usize>().ok()).sum()
        };
        let who = if rustix::process::geteuid().is_root() { "root" } else { "an ordinary user" };
        say(&format!("documents: as {who}: {} blocks run, {} pass", sum(0), sum(1)));
    }
    code
}

fn say(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// The case: a document's blocks, in order, up to the first that fails.
fn run(path: &str, stage: &Stage) {
    prepare(stage);
    let is_root = stage.lane.enter == Enter::Root;
    let skipped = if is_root { Who::User } else { Who::Root };
    let (mut run, mut passed) = (0, 0);
    let mut failed = None;
    for block in read(&text(path)).blocks {
        let outcome = match &block.how {
            Use::NotRun(_) => continue,
            Use::Run(who) if *who == skipped => continue,
            Use::Configuration => {
                let file = stage.write("block.toml", &block.text);
                stage.fsprov(["config", "show"]).env("FSPROV_CONFIG", file).run()
            }
            // Read as it would be pasted into a terminal: a shell that a line starts reads the lines after it.
            Use::Run(_) | Use::SetUp => {
                let file = stage.write("block", &block.text);
                let search = std::env::join_paths(
                    std::iter::once(stage.path("bin"))
                        .chain(std::env::split_paths(&std::env::var_os("PATH").expect("PATH"))),
                );
                let shell = stage.tool("bash", ["-c", "exec bash -ev <\"$0\""]).arg(file).cwd(stage.path("here"));
                shell.env("PATH", search.expect("no colon in it")).env("SHELL", stage.path("bin/strict")).run()
            }
        };
        let counts = usize::from(!matches!(block.how, Use::SetUp));
        run += counts;
        if outcome.code() != Some(0) {
            failed = Some(format!("{path}:{}: this block failed:\n{}\n{}", block.line, block.text, outcome.describe()));
            break;
        }
        passed += counts;
    }
    say(&format!("{}{run} {passed}", harness::NOTE));
    if let Some(why) = failed {
        panic!("{why}");
    }
}

/// What a reader has: fsprov, an empty directory to work in, and a network with Debian and registries on it.
fn prepare(stage: &Stage) {
    let bin = stage.mkdir("bin");
    stage.mkdir("here");
    symlink(stage::program(), bin.join("fsprov")).expect("symlink");
    let script = |name: &str, text: String| {
        fs::set_permissions(stage.write(bin.join(name), text), fs::Permissions::from_mode(0o755)).expect("chmod");
    };
    script("strict", "#!/bin/sh\nexec bash -ev \"$@\"\n".into());
    script("registry", include_str!("documents/registry").into());
    // scripts/setup has made this one with mmdebstrap, and that takes 20 s each time.
    let debian = images::minbase_source().expect("a Debian root filesystem");
    script(
        "mmdebstrap",
        format!("#!/bin/sh\nfor last; do :; done\nexec cp --reflink=auto '{}' \"$last\"\n", debian.display()),
    );
    if stage.lane.enter == Enter::Root {
        // What the documents call /run and /srv are not this machine's.
        for dir in ["/run", "/srv"] {
            stage.tool("mount", ["-t", "tmpfs", "tmpfs", dir]).run().ok();
        }
    }
}

/// Read a document. Its faults are those that it has by itself.
fn read(text: &str) -> Document {
    let mut document = Document::default();
    let mut block: Option<Block> = None;
    let mut heading: Option<String> = None;
    for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
        let line = text[..range.start].matches('\n').count() + 1;
        match event {
            Event::Start(Tag::CodeBlock(kind)) => match kind_of(&kind) {
                Ok(how) => block = how.map(|how| Block { line, text: String::new(), how }),
                Err(why) => document.faults.push(format!("{line}: {why}")),
            },
            Event::End(TagEnd::CodeBlock) => document.blocks.extend(block.take()),
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => document.headings.extend(heading.take().map(|text| anchor(&text))),
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                document.links.push((line, dest_url.into_string()));
            }
            Event::Text(part) | Event::Code(part) => {
                if let Some(block) = &mut block {
                    block.text.push_str(&part);
                } else if let Some(heading) = &mut heading {
                    heading.push_str(&part);
                }
            }
            Event::Start(Tag::HtmlBlock) => {
                let comment = text[range].trim().strip_prefix("<!-- run").and_then(|rest| rest.strip_suffix("-->"));
                document.blocks.extend(comment.map(|text| Block { line, text: text.into(), how: Use::SetUp }));
            }
            _ => {}
        }
    }
    document
}

/// What a block is for; none for one that is no command. An error for one that does not say.
fn kind_of(kind: &CodeBlockKind<'_>) -> Result<Option<Use>, String> {
    let CodeBlockKind::Fenced(info) = kind else {
        return Err("an indented block: put fences around it, with a language".into());
    };
    let (language, more) = info.split_once(' ').unwrap_or((info, ""));
    match (language, more.trim()) {
        ("sh", "") => Ok(Some(Use::Run(Who::Anyone))),
        ("sh", "root") => Ok(Some(Use::Run(Who::Root))),
        ("sh", "user") => Ok(Some(Use::Run(Who::User))),
        ("sh", more) => match more.strip_prefix("not-run=\"").and_then(|rest| rest.strip_suffix('"')) {
            Some(why) if why.len() > 10 => Ok(Some(Use::NotRun(why.into()))),
            _ => Err(format!("sh takes root, user or not-run=\"why\", not {more:?}")),
        },
        ("toml", "") => Ok(Some(Use::Configuration)),
        ("text", "") => Ok(None),
        (other, _) => Err(format!("a block's language is sh, toml or text, not {other:?}")),
    }
}

/// How GitHub links to a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Read every document of the checkout, and add what is wrong between them.
fn check_documents() -> Vec<(&'static str, Document)> {
    let mut documents: Vec<_> = DOCUMENTS.iter().map(|(path, _)| (*path, read(&text(path)))).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let headings: Vec<_> = documents.iter().map(|(path, d)| (root.join(path), d.headings.clone())).collect();
    for (path, document) in &mut documents {
        let here = root.join(*path);
        for (line, link) in
            document.links.iter().filter(|(_, link)| !link.contains("://") && !link.starts_with("mailto:"))
        {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let to = if file.is_empty() { here.clone() } else { here.parent().expect("a directory").join(file) };
            let Ok(to) = to.canonicalize() else {
                document.faults.push(format!("{line}: {link}: there is no such file"));
                continue;
            };
            let has = headings.iter().find(|(of, _)| of.canonicalize().is_ok_and(|of| of == to));
            if !heading.is_empty() && !has.is_some_and(|(_, headings)| headings.contains(heading)) {
                document.faults.push(format!("{line}: {link}: there is no such heading"));
            }
        }
    }
    // The picture is made by typing the README's tutorial.
    let drawn = fs::read_to_string(root.join("docs/first-session.svg")).unwrap_or_default().replace("&#160;", " ");
    let drawn = drawn.replace("&quot;", "\"").replace("&amp;", "&").replace("&#x27;", "'");
    let tutorial = text("README.md");
    let tutorial = tutorial.split("\n## ").find(|part| part.starts_with("Tutorial\n")).unwrap_or_default();
    let typed = read(tutorial).blocks.into_iter().flat_map(|b| b.text.lines().map(str::to_owned).collect::<Vec<_>>());
    for line in typed.filter(|line| !line.starts_with("mmdebstrap ") && !drawn.contains(&format!("$ {line}"))) {
        let faults = vec![format!("docs/first-session.svg does not show `{line}`: scripts/picture makes it again")];
        documents.push(("README.md", Document { faults, ..Document::default() }));
    }
    let found = [root.to_owned(), root.join("docs")]
        .into_iter()
        .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
    for entry in found.filter(|entry| entry.path().extension().is_some_and(|e| e == "md")) {
        let path = entry.path().strip_prefix(root).expect("below it").to_string_lossy().into_owned();
        if !DOCUMENTS.iter().any(|(name, _)| *name == path) {
            let faults = vec![format!("1: {path} is not in the list of tests/documents.rs")];
            documents.push(("", Document { faults, ..Document::default() }));
        }
    }
    documents
}
