use super::*;

fn with(field: &str, value: &str) -> String {
    let base = [("acKind", r#""ImageManifest""#), ("acVersion", r#""0.8.11""#), ("name", r#""example.com/app""#)];
    let mut parts: Vec<String> =
        base.iter().filter(|(name, _)| *name != field).map(|(name, value)| format!("\"{name}\":{value}")).collect();
    parts.push(format!("\"{field}\":{value}"));
    format!("{{{}}}", parts.join(","))
}

fn app(fields: &str) -> String {
    with("app", &format!(r#"{{"exec":["/bin/sh"],"user":"0","group":"0"{fields}}}"#))
}

#[test]
fn the_specifications_example_is_read() {
    let text = r#"{
        "acKind": "ImageManifest", "acVersion": "0.8.11", "name": "example.com/reduce-worker",
        "labels": [{"name": "version", "value": "1.0.0"}, {"name": "arch", "value": "amd64"}, {"name": "os", "value": "linux"}],
        "app": {
            "exec": ["/usr/bin/reduce-worker", "--quiet"], "user": "100", "group": "300", "supplementaryGIDs": [400, 500],
            "eventHandlers": [{"exec": ["/usr/bin/data-downloader"], "name": "pre-start"}],
            "workingDirectory": "/opt/work", "environment": [{"name": "REDUCE_WORKER_DEBUG", "value": "true"}],
            "isolators": [{"name": "resource/cpu", "value": {"request": "250m", "limit": "500m"}}],
            "mountPoints": [{"name": "work", "path": "/opt/work"}],
            "ports": [{"name": "health", "port": 4000, "protocol": "tcp", "socketActivated": true}]
        },
        "dependencies": [{"imageName": "example.com/reduce-worker-base", "imageID": "sha512-0a", "size": 22017258,
            "labels": [{"name": "os", "value": "linux"}]}],
        "pathWhitelist": ["/etc/ca/example.com/crt", "/usr/bin/map-reduce-worker"],
        "annotations": [{"name": "created", "value": "2014-10-27T19:32:27.67021798Z"}]
    }"#;
    let checked = Manifest::parse(text.as_bytes(), Strictness::Strict).unwrap();
    assert!(checked.warnings.is_empty());
    assert_eq!(checked.manifest.label("version"), Some("1.0.0"));
    assert_eq!(checked.manifest.dependencies[0].image_id.as_deref(), Some("sha512-0a"));
    let again = serde_json::to_vec(&checked.manifest).unwrap();
    assert_eq!(Manifest::parse(&again, Strictness::Strict).unwrap().manifest, checked.manifest);
}

#[test]
fn each_rule_names_its_field_and_value_in_both_modes() {
    let cases = [
        (with("acKind", r#""PodManifest""#), "acKind is \"PodManifest\""),
        (with("acVersion", r#""1""#), "acVersion is \"1\""),
        (with("name", r#""Example""#), "name is \"Example\""),
        (with("name", r#""a//b""#), "name is \"a//b\""),
        (with("name", r#""a-""#), "name is \"a-\""),
        (with("name", r#""""#), "name is \"\""),
        (with("labels", r#"[{"name":"a","value":"1"},{"name":"a","value":"2"}]"#), "labels is \"a\""),
        (with("labels", r#"[{"name":"name","value":"1"}]"#), "labels is \"name\""),
        (with("labels", r#"[{"name":"A","value":"1"}]"#), "labels.name is \"A\""),
        (with("annotations", r#"[{"name":"a","value":"1"},{"name":"a","value":"2"}]"#), "annotations is \"a\""),
        (with("dependencies", r#"[{"imageName":"A"}]"#), "dependencies[0].imageName is \"A\""),
        (
            with("dependencies", r#"[{"imageName":"a","imageID":"sha512-X"}]"#),
            "dependencies[0].imageID is \"sha512-X\"",
        ),
        (with("dependencies", r#"[{"imageName":"a","imageID":"../x"}]"#), "dependencies[0].imageID is \"../x\""),
        (with("pathWhitelist", r#"["/a","b"]"#), "pathWhitelist[1] is \"b\""),
        (with("pathWhitelist", r#"["/a/../b"]"#), "pathWhitelist[0] is \"/a/../b\""),
    ];
    for (text, want) in cases {
        for strictness in [Strictness::Strict, Strictness::Lenient] {
            let error = Manifest::parse(text.as_bytes(), strictness).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(want), "{text}: {error}");
        }
    }
}

#[test]
fn rules_that_nothing_depends_on_are_warnings_when_lenient() {
    let cases = [
        (with("labels", r#"[{"name":"os","value":"plan9"}]"#), "labels.os is \"plan9\""),
        (with("labels", r#"[{"name":"os","value":"linux"},{"name":"arch","value":"z80"}]"#), "labels.arch is \"z80\""),
        (with("labels", r#"[{"name":"arch","value":"amd64"}]"#), "labels.arch is \"amd64\""),
        (with("annotations", r#"[{"name":"created","value":"1438983392"}]"#), "annotations.created is \"1438983392\""),
        (with("annotations", r#"[{"name":"homepage","value":"x"}]"#), "annotations.homepage is \"x\""),
        (with("app", r#"{"exec":null,"user":"0","group":"0"}"#), "app.exec is \"null\""),
        (with("app", r#"{"exec":["a"],"group":"0"}"#), "app.user is \"\""),
        (with("app", r#"{"exec":["a"],"user":"0"}"#), "app.group is \"\""),
        (app(r#","workingDirectory":"x""#), "app.workingDirectory is \"x\""),
        (app(r#","environment":[{"name":"","value":""}]"#), "app.environment.name is \"\""),
        (app(r#","eventHandlers":[{"name":"x","exec":["a"]}]"#), "app.eventHandlers.name is \"x\""),
        (app(r#","mountPoints":[{"name":"A","path":"/a"}]"#), "app.mountPoints.name is \"A\""),
        (app(r#","mountPoints":[{"name":"a","path":"a"}]"#), "app.mountPoints.path is \"a\""),
        (app(r#","ports":[{"name":"a","protocol":"tcp","port":0}]"#), "app.ports.port is \"0\""),
        (app(r#","ports":[{"name":"a","protocol":"tcp","port":65535,"count":2}]"#), "app.ports.port is \"65535\""),
        (app(r#","isolators":[{"name":"A","value":1}]"#), "app.isolators.name is \"A\""),
    ];
    for (text, want) in cases {
        let error = Manifest::parse(text.as_bytes(), Strictness::Strict).unwrap_err();
        assert!(error.to_string().contains(want), "{text}: {error}");
        let checked = Manifest::parse(text.as_bytes(), Strictness::Lenient).unwrap();
        assert!(checked.warnings.iter().any(|w| w.contains(want)), "{text}: {:?}", checked.warnings);
    }
}

#[test]
fn json_that_is_no_manifest_is_refused() {
    let twice = r#"{"acKind":"ImageManifest","acKind":"ImageManifest","acVersion":"0.8.11","name":"a"}"#;
    for text in ["", "null", "[]", "{}", "{\"acKind\":1}", twice, "\u{feff}{}"] {
        assert!(Manifest::parse(text.as_bytes(), Strictness::Lenient).is_err(), "{text}");
    }
    let long = with("name", &format!("{:?}", "a".repeat(super::super::MAX_MANIFEST_BYTES)));
    assert_eq!(Manifest::parse(long.as_bytes(), Strictness::Strict).unwrap_err().kind(), Kind::Limit);
}

#[test]
fn a_made_manifest_is_a_good_one() {
    let made = serde_json::to_vec(&Manifest::named("debian/minbase").unwrap()).unwrap();
    assert_eq!(Manifest::parse(&made, Strictness::Strict).unwrap().manifest.name, "debian/minbase");
    assert!(Manifest::named("Debian").is_err());
}
