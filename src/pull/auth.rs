//! Logins at registries: from the files that `podman login` and `docker login` write (containers-auth.json(5)), and the token that
//! a registry wants to have fetched with them (distribution specification, "Token authentication").

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use serde::Deserialize;

use super::http::{Answer, Client, DOCKER_API, Failure, Url, encode};
use super::reference::DOCKER_IO;
use crate::error::{Error, Kind, Result, show};

/// Longest file of logins and answer of a token service read.
const MAX_BYTES: u64 = 1 << 20;
/// Longest that a credential helper may take: it may ask an agent, not a person.
const HELPER_LIMIT: Duration = Duration::from_secs(30);

/// Name and password.
#[derive(Clone, PartialEq, Eq)]
struct Login {
    user: String,
    password: String,
}

impl Login {
    fn basic(&self) -> String {
        format!("Basic {}", BASE64.encode(format!("{}:{}", self.user, self.password).as_bytes()))
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
struct Entry {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
}

/// The files that may hold logins, the first that knows a registry counts. One that is named must be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AuthFiles {
    named: Option<PathBuf>,
    usual: Vec<PathBuf>,
}

impl AuthFiles {
    pub(super) fn find(named: Option<PathBuf>, uid: u32, env: impl Fn(&str) -> Option<std::ffi::OsString>) -> Self {
        let absolute = |name: &str| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let named = named.or_else(|| absolute("REGISTRY_AUTH_FILE"));
        let run = absolute("XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/containers/{uid}").into());
        let home = absolute("HOME");
        let below_home = |name: &str| home.as_ref().map(|home| home.join(name));
        let mut usual = vec![run.join("containers/auth.json"), run.join("auth.json")];
        let config = absolute("XDG_CONFIG_HOME").or_else(|| below_home(".config"));
        usual.extend(config.map(|dir| dir.join("containers/auth.json")));
        usual.extend(absolute("DOCKER_CONFIG").or_else(|| below_home(".docker")).map(|dir| dir.join("config.json")));
        AuthFiles { named, usual }
    }

    fn login(&self, host: &str, repository: &str) -> Result<Option<Login>> {
        if let Some(path) = &self.named {
            let file = read(path)?.ok_or_else(|| {
                let why = std::io::Error::from(std::io::ErrorKind::NotFound);
                Error::io("read logins", show(path), why).hint("it is named by auth_file or REGISTRY_AUTH_FILE")
            })?;
            return file.login(host, repository).map_err(|e| e.within("read logins", show(path)));
        }
        for path in &self.usual {
            let Some(file) = read(path)? else { continue };
            if let Some(login) = file.login(host, repository).map_err(|e| e.within("read logins", show(path)))? {
                log::debug!("the login for {host} is of {}", show(path));
                return Ok(Some(login));
            }
        }
        Ok(None)
    }
}

fn read(path: &Path) -> Result<Option<AuthFile>> {
    let text = match std::fs::File::open(path) {
        Ok(file) => crate::sys::fs::read_bounded("read logins", show(path), file, MAX_BYTES)?,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(Error::io("read logins", show(path), e)),
    };
    // What is in it must not get into a message.
    let wrong = |e: serde_json::Error| format!("not a file of logins (line {}, column {})", e.line(), e.column());
    serde_json::from_slice(&text).map(Some).map_err(|e| Error::new(Kind::Invalid, "read logins", show(path), wrong(e)))
}

/// Docker wrote URLs once: `https://index.docker.io/v1/` is docker.io.
fn key_host(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    if matches!(key, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { key }
}

impl AuthFile {
    /// The longest key that is the host, or the host and the beginning of the repository.
    fn login(&self, host: &str, repository: &str) -> Result<Option<Login>> {
        let full = format!("{host}/{repository}");
        let fits = |key: &str| {
            let key = key_host(key);
            full.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                && key.len() >= host.len()
        };
        let helper = self.cred_helpers.iter().find(|(key, _)| key_host(key) == host).map(|(_, helper)| helper);
        if let Some(helper) = helper {
            return ask_helper(helper, host);
        }
        let best = self.auths.iter().filter(|(key, _)| fits(key)).max_by_key(|(key, _)| key_host(key).len());
        if let Some((_, entry)) = best
            && let Some(login) = entry.login(host)?
        {
            return Ok(Some(login));
        }
        self.creds_store.as_ref().map_or(Ok(None), |helper| ask_helper(helper, host))
    }
}

impl Entry {
    fn login(&self, host: &str) -> Result<Option<Login>> {
        if self.identitytoken.is_some() {
            return Err(Error::new(Kind::Unsupported, "log in at", host, "the login is an identity token")
                .hint("log in with a name and a password or access token"));
        }
        if let Some(auth) = self.auth.as_ref().filter(|auth| !auth.is_empty()) {
            let text =
                BASE64.decode(auth.trim_end_matches('\0').as_bytes()).ok().and_then(|b| String::from_utf8(b).ok());
            let pair = text.as_deref().and_then(|text| text.split_once(':'));
            let (user, password) = pair.ok_or_else(|| {
                Error::new(Kind::Invalid, "log in at", host, "auth is not the base64 of NAME:PASSWORD")
            })?;
            return Ok(Some(Login { user: user.into(), password: password.trim_end_matches('\0').into() }));
        }
        Ok(match (&self.username, &self.password) {
            (Some(user), Some(password)) => Some(Login { user: user.clone(), password: password.clone() }),
            _ => None,
        })
    }
}

/// `docker-credential-NAME get` (docker-credential-helpers): the host on its stdin, JSON on its stdout.
fn ask_helper(helper: &str, host: &str) -> Result<Option<Login>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Said {
        username: String,
        secret: String,
    }
    let program = format!("docker-credential-{helper}");
    let failed = |why: String| Error::new(Kind::Helper, "ask", &program, why);
    if helper.is_empty() || !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
        return Err(Error::new(
            Kind::Invalid,
            "ask credential helper",
            format!("{helper:?}"),
            "not the name of a helper",
        ));
    }
    let mut out = tempfile::tempfile().map_err(|e| Error::io("make", "a temporary file", e))?;
    let to = out.try_clone().map_err(|e| Error::io("duplicate descriptor", "", e))?;
    let mut command = Command::new(&program);
    let mut child = command
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(to)
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| Error::io("run", &program, e).hint("the file of logins says that it has them"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // Docker's own key for its registry is the old URL.
        let key = if host == "docker.io" { "https://index.docker.io/v1/" } else { host };
        let _ = stdin.write_all(key.as_bytes());
    }
    let until = Instant::now() + HELPER_LIMIT;
    let status = loop {
        match child.try_wait().map_err(|e| Error::io("wait for", &program, e))? {
            Some(status) => break status,
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(10)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("no answer after {HELPER_LIMIT:?}")));
            }
        }
    };
    let mut said = Vec::new();
    std::io::Seek::rewind(&mut out)
        .and_then(|()| out.take(MAX_BYTES).read_to_end(&mut said))
        .map_err(|e| Error::io("read answer of", &program, e))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&said).trim().chars().take(200).collect::<String>();
        if said.contains("not found") {
            return Ok(None);
        }
        return Err(failed(format!("{status}: {said}")));
    }
    let said: Said =
        serde_json::from_slice(&said).map_err(|_| failed("it gave no JSON with Username and Secret".into()))?;
    if said.username == "<token>" {
        return Err(failed("it gave an identity token, which is not supported".into()));
    }
    Ok(Some(Login { user: said.username, password: said.secret }))
}

/// How one repository of one registry is asked: with nothing, until it wants a login.
pub(super) struct Session<'a> {
    client: &'a Client,
    host: String,
    /// Whose login counts: `docker.io` for docker's registry, whatever host answers for it.
    login_host: String,
    repository: String,
    files: &'a AuthFiles,
    /// The value of the Authorization header.
    header: Mutex<Option<String>>,
}

impl<'a> Session<'a> {
    pub(super) fn new(client: &'a Client, files: &'a AuthFiles, host: &str, repository: &str) -> Self {
        let api = if host == DOCKER_IO { DOCKER_API } else { host };
        Session {
            client,
            host: api.into(),
            login_host: host.into(),
            repository: repository.into(),
            files,
            header: Mutex::default(),
        }
    }

    /// The registry, as logins and people name it.
    pub(super) fn login_host(&self) -> &str {
        &self.login_host
    }

    /// The repository.
    pub(super) fn repository(&self) -> &str {
        &self.repository
    }

    /// The URL of something of this repository.
    pub(super) fn url(&self, what: &str) -> Url {
        let path = format!("/v2/{}/{what}", self.repository);
        Url { is_tls: self.client.speaks_tls(&self.host), host: self.host.clone(), path }
    }

    /// GET; logs in when the registry wants it, and once more when a token has run out.
    pub(super) fn get(&self, url: &Url, headers: &[(&str, &str)]) -> std::result::Result<Answer, Failure> {
        let had = self.header.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = self.client.get(url, headers, had.as_deref())?;
        if answer.status != 401 || answer.url.host != url.host {
            return Ok(answer);
        }
        let challenges: Vec<String> = answer
            .headers
            .get_all("www-authenticate")
            .iter()
            .filter_map(|value| value.to_str().ok().map(str::to_owned))
            .collect();
        let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have logged in meanwhile.
        if *header == had {
            *header = Some(self.log_in(&challenges)?);
        }
        let value = header.clone();
        drop(header);
        self.client.get(url, headers, value.as_deref())
    }

    fn log_in(&self, challenges: &[String]) -> std::result::Result<String, Failure> {
        let login = self.files.login(&self.login_host, &self.repository)?;
        let mut basic = false;
        for text in challenges {
            for challenge in http_auth::parse_challenges(text).unwrap_or_default() {
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let param = |name: &str| {
                        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                        found.map(|(_, value)| value.to_unescaped())
                    };
                    return self.token(param("realm"), param("service"), login.as_ref());
                }
                basic |= challenge.scheme.eq_ignore_ascii_case("basic");
            }
        }
        match login {
            Some(login) if basic => Ok(login.basic()),
            _ => Err(self.refused(login.is_some()).into()),
        }
    }

    /// The registry does not let us.
    pub(super) fn refused(&self, has_login: bool) -> Error {
        let subject = format!("{} of {}", self.repository, self.login_host);
        let login = format!("`podman login {0}` or `docker login {0}` writes one", self.login_host);
        if has_login {
            return Error::new(Kind::Permission, "read", subject, "the registry refuses the login it was given")
                .hint(format!("{login} again; a registry may also refuse a repository that does not exist"));
        }
        Error::new(Kind::Permission, "read", subject, "the registry wants a login, or has no such repository").hint(
            format!(
                "{login}; they are looked for in $REGISTRY_AUTH_FILE, containers/auth.json and ~/.docker/config.json"
            ),
        )
    }

    /// Has a login been sent?
    pub(super) fn has_login(&self) -> bool {
        matches!(self.files.login(&self.login_host, &self.repository), Ok(Some(_)))
    }

    fn token(
        &self,
        realm: Option<String>,
        service: Option<String>,
        login: Option<&Login>,
    ) -> std::result::Result<String, Failure> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let invalid = |why: &'static str| Error::new(Kind::Invalid, "log in at", &self.login_host, why);
        let realm = realm.ok_or_else(|| invalid("it names no realm to fetch a token from"))?;
        // What is asked for is what we need, whatever it says.
        let mut query = format!("scope={}", encode(&format!("repository:{}:pull", self.repository)));
        if let Some(service) = service {
            query = format!("service={}&{query}", encode(&service));
        }
        let registry = self.url("");
        let mut url = self.client.told_by(&registry, Url::parse(&realm)?)?;
        if login.is_some() && !self.client.takes_login(&registry, &url) {
            let why = format!("it sends us to {} for a token, for which its login is not", url.host);
            return Err(Error::new(Kind::Permission, "log in at", &self.login_host, why)
                .hint(format!(
                    "if that is right, the configuration says so: [registry.\"{}\"] auth = \"{}\"",
                    self.login_host, url.host
                ))
                .into());
        }
        url.path = format!("{}{}{query}", url.path, if url.path.contains('?') { '&' } else { '?' });
        let basic = login.map(Login::basic);
        let answer = self.client.get(&url, &[], basic.as_deref())?;
        match answer.status {
            200 => {}
            401 | 403 => return Err(self.refused(login.is_some()).into()),
            status => {
                let error = Error::new(Kind::Io, "fetch token from", &url, format!("it answers {status}"));
                return Err(Failure { error, is_passing: status >= 500 || status == 429 });
            }
        }
        let body = answer.small(MAX_BYTES)?;
        let token: Token = serde_json::from_slice(&body).map_err(|_| invalid("its token service gave no JSON"))?;
        let token = token.token.or(token.access_token).filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| invalid("its token service gave no token"))?;
        Ok(format!("Bearer {token}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> AuthFile {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_most_particular_login_is_taken() {
        let pair = |text: &str| BASE64.encode(text.as_bytes());
        let text = format!(
            r#"{{"auths":{{"reg.example.com":{{"auth":"{}"}},"reg.example.com/team":{{"auth":"{}"}},
                "https://index.docker.io/v1/":{{"auth":"{}"}},"empty":{{}},"bad":{{"auth":"x"}},"id":{{"identitytoken":"t"}}}}}}"#,
            pair("a:1"),
            pair("b:2:3"),
            pair("d:4")
        );
        let file = file(&text);
        let login = |host: &str, repo: &str| {
            file.login(host, repo).map(|login| login.map(|l| format!("{} {}", l.user, l.password)))
        };
        assert_eq!(login("reg.example.com", "x").unwrap().as_deref(), Some("a 1"));
        assert_eq!(login("reg.example.com", "team/x").unwrap().as_deref(), Some("b 2:3"));
        assert_eq!(login("reg.example.com", "teamx").unwrap().as_deref(), Some("a 1"));
        assert_eq!(login("docker.io", "library/x").unwrap().as_deref(), Some("d 4"));
        assert_eq!(login("reg.example", "x").unwrap(), None);
        assert_eq!(login("reg.example.com:5000", "x").unwrap(), None);
        assert_eq!(login("empty", "x").unwrap(), None);
        assert_eq!(login("bad", "x").unwrap_err().kind(), Kind::Invalid);
        assert_eq!(login("id", "x").unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn where_logins_lie() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into())
        };
        let files = AuthFiles::find(None, 7, env(&[("HOME", "/h")]));
        let want = [
            "/run/containers/7/containers/auth.json",
            "/run/containers/7/auth.json",
            "/h/.config/containers/auth.json",
            "/h/.docker/config.json",
        ];
        assert_eq!(files.usual, want.map(PathBuf::from));
        let files = AuthFiles::find(
            None,
            7,
            env(&[("XDG_RUNTIME_DIR", "/r"), ("REGISTRY_AUTH_FILE", "/a"), ("DOCKER_CONFIG", "/d")]),
        );
        assert_eq!(files.named.as_deref(), Some(Path::new("/a")));
        assert_eq!(files.usual[0], Path::new("/r/containers/auth.json"));
        assert_eq!(files.usual[2], Path::new("/d/config.json"));
        assert!(files.login("x", "y").is_err(), "a file that is named must be there");
    }

    #[test]
    fn a_helper_is_a_name() {
        assert_eq!(ask_helper("../../bin/sh", "x").err().unwrap().kind(), Kind::Invalid);
        assert_eq!(ask_helper("", "x").err().unwrap().kind(), Kind::Invalid);
    }
}
