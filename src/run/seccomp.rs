//! containers-common's seccomp profile, as it is installed for podman, in the runtime specification's form.
//!
//! Its rules say for which architectures and capabilities they hold; a runtime wants those that do.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxSeccomp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, Kind, Result, show};
use crate::sys::fs::read_bounded;

/// Where it is: the administrator's before the distribution's (containers.conf(5), `seccomp_profile`).
const PLACES: [&str; 2] = ["/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json"];
/// Longest profile read; that of 2026 has 17 KB.
const MAX_BYTES: u64 = 1 << 20;

/// A profile as docker and podman write it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    arch_map: Vec<ArchMap>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    action: String,
    #[serde(default)]
    args: Option<Vec<Value>>,
    errno_ret: Option<u32>,
    #[serde(default)]
    includes: Filter,
    #[serde(default)]
    excludes: Filter,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Filter {
    caps: Vec<String>,
    arches: Vec<String>,
}

/// The profile that is installed. `None`: none is.
pub(crate) fn installed() -> Option<PathBuf> {
    PLACES.iter().map(PathBuf::from).find(|path| path.is_file())
}

/// A profile, for a program with these capabilities.
pub(crate) fn load(path: &Path, capabilities: &BTreeSet<String>) -> Result<LinuxSeccomp> {
    const OP: &str = "read seccomp profile";
    let file = std::fs::File::open(path).map_err(|e| Error::io(OP, show(path), e))?;
    let bytes = read_bounded(OP, show(path), file, MAX_BYTES)?;
    convert(&bytes, capabilities, std::env::consts::ARCH)
        .map_err(|e| Error::new(Kind::Invalid, OP, show(path), e).hint("--seccomp none goes without one"))
}

/// libseccomp's word for an architecture of Rust's.
fn native(arch: &str) -> &str {
    match arch {
        "x86_64" => "SCMP_ARCH_X86_64",
        "x86" => "SCMP_ARCH_X86",
        "aarch64" => "SCMP_ARCH_AARCH64",
        "arm" => "SCMP_ARCH_ARM",
        "powerpc64" => "SCMP_ARCH_PPC64LE",
        "riscv64" => "SCMP_ARCH_RISCV64",
        "s390x" => "SCMP_ARCH_S390X",
        _ => "",
    }
}

/// Go's word, by which rules say where they hold.
fn go_arch(arch: &str) -> &str {
    match arch {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

fn convert(
    bytes: &[u8],
    capabilities: &BTreeSet<String>,
    arch: &str,
) -> std::result::Result<LinuxSeccomp, serde_json::Error> {
    let profile: Profile = serde_json::from_slice(bytes)?;
    let mut architectures = profile.architectures;
    for map in profile.arch_map.into_iter().filter(|map| map.architecture == native(arch)) {
        architectures.push(map.architecture);
        architectures.extend(map.sub_architectures.unwrap_or_default());
    }
    let names_arch = |arches: &[String]| arches.iter().any(|one| one == go_arch(arch));
    let has = |name: &String| capabilities.contains(name);
    // As podman's and moby's: an inclusion must hold whole, one exclusion is enough.
    let holds = |rule: &Rule| {
        (rule.includes.arches.is_empty() || names_arch(&rule.includes.arches))
            && rule.includes.caps.iter().all(has)
            && !names_arch(&rule.excludes.arches)
            && !rule.excludes.caps.iter().any(has)
    };
    let syscalls: Vec<Value> = profile
        .syscalls
        .iter()
        .filter(|rule| holds(rule) && !rule.names.is_empty())
        .map(|rule| {
            let mut one = json!({ "names": rule.names, "action": rule.action });
            if let Some(errno) = rule.errno_ret {
                one["errnoRet"] = errno.into();
            }
            if let Some(args) = rule.args.as_ref().filter(|args| !args.is_empty()) {
                one["args"] = args.clone().into();
            }
            one
        })
        .collect();
    let mut whole = json!({ "defaultAction": profile.default_action, "syscalls": syscalls });
    if !architectures.is_empty() {
        whole["architectures"] = json!(architectures);
    }
    if let Some(errno) = profile.default_errno_ret {
        whole["defaultErrnoRet"] = errno.into();
    }
    serde_json::from_value(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"defaultErrno":"ENOSYS",
        "archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"]},
                   {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]}],
        "syscalls":[{"names":["read","write"],"action":"SCMP_ACT_ALLOW","args":[],"comment":"","includes":{},"excludes":{}},
                    {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":8,"valueTwo":0,"op":"SCMP_CMP_EQ"}]},
                    {"names":["arch_prctl"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["amd64","x32"]}},
                    {"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
                    {"names":["mount"],"action":"SCMP_ACT_ERRNO","errnoRet":1,"excludes":{"caps":["CAP_SYS_ADMIN"]}}]}"#;

    fn names(arch: &str, caps: &[&str]) -> Value {
        let caps = caps.iter().map(|c| (*c).to_owned()).collect();
        serde_json::to_value(convert(PROFILE.as_bytes(), &caps, arch).unwrap()).unwrap()
    }

    #[test]
    fn rules_that_hold_here() {
        let got = names("x86_64", &[]);
        assert_eq!(got["architectures"], json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]));
        assert_eq!((&got["defaultAction"], &got["defaultErrnoRet"]), (&json!("SCMP_ACT_ERRNO"), &json!(38)));
        assert_eq!(
            got["syscalls"],
            json!([
                {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]},
                {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
            ])
        );
        let arm = names("aarch64", &["CAP_SYS_ADMIN"]);
        assert_eq!(arm["architectures"], json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]));
        let rules: Vec<_> =
            arm["syscalls"].as_array().unwrap().iter().map(|r| (r["names"][0].clone(), r["action"].clone())).collect();
        assert_eq!(rules[2], (json!("mount"), json!("SCMP_ACT_ALLOW")));
        assert_eq!(rules.len(), 3);
    }

    #[test]
    fn the_installed_profile_is_read() {
        let Some(path) = installed() else { return crate::lacks("containers-common's seccomp profile") };
        let profile = serde_json::to_value(load(&path, &BTreeSet::new()).unwrap()).unwrap();
        let allowed = |name: &str| {
            let rules = profile["syscalls"].as_array().unwrap();
            rules
                .iter()
                .any(|r| r["action"] == "SCMP_ACT_ALLOW" && r["names"].as_array().unwrap().contains(&json!(name)))
        };
        assert!(allowed("openat") && allowed("execve") && !allowed("kexec_load"));
    }
}
