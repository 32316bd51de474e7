//! One HTTP client for registries and discovery. It waits in the calling thread: no runtime is up before a fork.
//!
//! Whom it speaks to without TLS, and whose certificate it takes, is said per host ([`HostConfig`]). A redirect is followed a few
//! times, never from https to http, and takes no login to another host. Who is elsewhere sends us nowhere on this machine
//! ([`Client::told_by`]): what listens at localhost trusts who asks from there. Nothing here reads a body without a bound: the
//! callers' [`Answer::small`] and [`Answer::reader`] have one.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ureq::http::{HeaderMap, Request, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, Body};

use super::reference::{DOCKER_IO, is_host, is_repository};
use crate::error::{Error, Kind, Result, show};

/// Until a host must have taken the connection, its TLS included.
const CONNECT: Duration = Duration::from_secs(15);
/// Until the head of its answer must have come: registries look the blob up in slow object stores first.
const ANSWER: Duration = Duration::from_secs(60);
/// Longest silence in the middle of an answer.
const SILENCE: Duration = Duration::from_secs(30);
/// Redirects followed; registries send one, to their object store.
const MAX_REDIRECTS: usize = 5;
/// Longest file of certificates read.
const MAX_CA_BYTES: u64 = 4 << 20;

/// The host that answers for [`DOCKER_IO`].
pub(super) const DOCKER_API: &str = "registry-1.docker.io";

/// How one host is spoken to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Plain http.
    #[serde(default)]
    pub insecure: bool,
    /// `HOST[:PORT][/PATH]` that is asked first for what this registry has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<String>,
    /// Certificates (PEM) that are trusted for it, instead of the system's. Absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// `HOST[:PORT]` of a token service that its login is for, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<String>,
}

impl HostConfig {
    /// Is this, for `host`, what may stand in a configuration file?
    pub fn check(&self, host: &str) -> Result<()> {
        let refuse = |what: &str, value: &str, why: &'static str| {
            Err(Error::new(Kind::Usage, format!("read {what}"), format!("{value:?}"), why))
        };
        if !is_host(host) {
            return refuse("registry", host, "it must be HOST or HOST:PORT");
        }
        if let Some(auth) = self.auth.as_ref().filter(|auth| !is_host(auth)) {
            return refuse("auth", auth, "it must be HOST or HOST:PORT");
        }
        let Some(mirror) = &self.mirror else { return Ok(()) };
        let (at, path) = mirror.split_once('/').unwrap_or((mirror, ""));
        if is_host(at) && (path.is_empty() || is_repository(path)) {
            return Ok(());
        }
        refuse("mirror", mirror, "it must be HOST[:PORT][/PATH]")
    }
}

/// An http or https URL: scheme, `HOST[:PORT]` and the path with the query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    pub(super) is_tls: bool,
    pub(super) host: String,
    pub(super) path: String,
}

impl Url {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let refuse = |why: &'static str| {
            let shown: String = text.chars().take(200).collect();
            Error::new(Kind::Invalid, "read URL", format!("{shown:?}"), why)
        };
        let uri: Uri = text.parse().map_err(|_| refuse("not a URL"))?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(refuse("it must be https or http")),
        };
        let host = uri.authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
        if !is_host(&host) {
            return Err(refuse("its host must be HOST or HOST:PORT"));
        }
        Ok(Url { is_tls, host, path: uri.path_and_query().map_or("/", |p| p.as_str()).to_owned() })
    }

    /// Where a redirect from here leads.
    fn join(&self, location: &str) -> Result<Self> {
        if location.starts_with('/') && !location.starts_with("//") {
            return Ok(Url { path: location.to_owned(), ..self.clone() });
        }
        Url::parse(location)
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http{}://{}{}", if self.is_tls { "s" } else { "" }, self.host, self.path)
    }
}

/// Text as a query's value.
pub(super) fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(byte as char),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

/// Is it this machine?
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.split(':').next().unwrap_or(""),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The last two labels of a host's name, which its owner has in common with who answers for it (`auth.docker.io` for `docker.io`);
/// none of an address or a name of one label.
fn owner(host: &str) -> Option<String> {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let labels: Vec<&str> = name.split('.').collect();
    let is_address = name.starts_with('[') || name.parse::<std::net::IpAddr>().is_ok();
    (!is_address && labels.len() >= 2).then(|| labels[labels.len() - 2..].join(".").to_ascii_lowercase())
}

/// Why a request came to nothing, and whether another try may help.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) is_passing: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, is_passing: false }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

/// What a host answered, whatever its status.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) url: Url,
    body: Body,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body, of at most `most` bytes.
    pub(super) fn small(self, most: u64) -> std::result::Result<Vec<u8>, Failure> {
        let url = self.url.to_string();
        let mut bytes = Vec::new();
        let read = self.reader().take(most + 1).read_to_end(&mut bytes);
        read.map_err(|e| Failure { error: Error::io("read answer of", &url, e), is_passing: true })?;
        if bytes.len() as u64 > most {
            let why = format!("it has more than {most} bytes");
            return Err(Error::new(Kind::Limit, "read answer of", url, why).into());
        }
        Ok(bytes)
    }

    /// The body; who reads it has a bound of his own.
    pub(super) fn reader(self) -> impl Read {
        self.body.into_with_config().limit(u64::MAX).reader()
    }
}

/// The client.
pub(super) struct Client {
    hosts: BTreeMap<String, HostConfig>,
    /// By the certificates they take, and whether they are for this machine.
    agents: Mutex<HashMap<(Option<PathBuf>, bool), Agent>>,
    /// Which local hosts speak TLS, once they were asked.
    local: Mutex<HashMap<String, bool>>,
}

impl Client {
    pub(super) fn new(hosts: BTreeMap<String, HostConfig>) -> Self {
        Client { hosts, agents: Mutex::default(), local: Mutex::default() }
    }

    /// What is said of a host; what is said of `docker.io` holds for the host that answers for it.
    pub(super) fn host(&self, host: &str) -> Option<&HostConfig> {
        self.hosts.get(host).or_else(|| self.hosts.get(DOCKER_IO).filter(|_| host == DOCKER_API))
    }

    /// May this host be spoken to without TLS?
    pub(super) fn may_be_plain(&self, host: &str) -> bool {
        is_local(host) || self.host(host).is_some_and(|config| config.insecure)
    }

    /// Does this host speak TLS? A host of this machine is asked; any other does, unless it is configured as insecure.
    pub(super) fn speaks_tls(&self, host: &str) -> bool {
        if self.host(host).is_some_and(|config| config.insecure) {
            return false;
        }
        if !is_local(host) {
            return true;
        }
        if let Some(known) = self.local.lock().unwrap_or_else(PoisonError::into_inner).get(host) {
            return *known;
        }
        let url = Url { is_tls: true, host: host.to_owned(), path: "/".into() };
        let speaks = match self.once(&url, &[]) {
            Ok(_) => true,
            // It does, and its certificate is not taken: that is an error to show, not a reason to go without.
            Err(error) => is_certificate(&error),
        };
        self.local.lock().unwrap_or_else(PoisonError::into_inner).insert(host.to_owned(), speaks);
        speaks
    }

    /// A URL that `origin` told us, a page or a registry: over plain http, or to this machine, only where the origin itself is of this
    /// machine, or the configuration says so of that host.
    pub(super) fn told_by(&self, origin: &Url, mut url: Url) -> Result<Url> {
        let is_configured = self.host(&url.host).is_some_and(|config| config.insecure);
        if is_local(&url.host) && !is_local(&origin.host) && !is_configured {
            let why = format!("{} is elsewhere, and may not send us to this machine", origin.host);
            return Err(Error::new(Kind::Permission, "ask", &url, why));
        }
        url.is_tls = url.is_tls && self.speaks_tls(&url.host);
        Ok(url)
    }

    /// Is the login of `registry` for the token service at `url`, too? It is for the registry's own host and hosts of the same owner, over
    /// TLS, and for the one that the configuration names.
    pub(super) fn takes_login(&self, registry: &Url, url: &Url) -> bool {
        let named = self.host(&registry.host).and_then(|config| config.auth.as_deref());
        if named == Some(&*url.host) || (registry.host == url.host && registry.is_tls == url.is_tls) {
            return true;
        }
        url.is_tls && owner(&url.host).is_some_and(|of| Some(of) == owner(&registry.host))
    }

    /// GET, following redirects. `login` is sent to the host of `url` alone.
    pub(super) fn get(
        &self,
        url: &Url,
        headers: &[(&str, &str)],
        login: Option<&str>,
    ) -> std::result::Result<Answer, Failure> {
        let mut at = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            if !at.is_tls && !self.may_be_plain(&at.host) {
                return Err(Error::new(Kind::Permission, "ask", &at, "it would go over plain http")
                    .hint(format!(
                        "a host that may be spoken to so is configured: [registry.\"{}\"] insecure = true",
                        at.host
                    ))
                    .into());
            }
            let mut all = headers.to_vec();
            // Our login is not for another host that this one sends us to.
            if let Some(login) = login.filter(|_| at.host == url.host && at.is_tls == url.is_tls) {
                all.push(("Authorization", login));
            }
            let answer = self.once(&at, &all).map_err(|e| explain(&at, e))?;
            log::debug!("GET {at}: {}", answer.status);
            if !matches!(answer.status, 301 | 302 | 303 | 307 | 308) {
                return Ok(answer);
            }
            let refuse = |why: String| Failure::from(Error::new(Kind::Invalid, "follow redirect of", &at, why));
            let location = answer.header("location").ok_or_else(|| refuse("it leads nowhere".into()))?;
            let next = at.join(location).map_err(|e| refuse(e.to_string()))?;
            if at.is_tls && !next.is_tls {
                return Err(refuse(format!("it leads from https to {next}")));
            }
            at = self.told_by(&at, next)?;
        }
        let why = format!("it leads to more than {MAX_REDIRECTS} others, one after another");
        Err(Error::new(Kind::Invalid, "follow redirect of", url, why).into())
    }

    fn once(&self, url: &Url, headers: &[(&str, &str)]) -> std::result::Result<Answer, ureq::Error> {
        let ca = self.host(&url.host).and_then(|config| config.ca.clone());
        let agent = self.agent(ca, is_local(&url.host))?;
        let mut request = Request::get(url.to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = agent.run(request.body(()).map_err(ureq::Error::Http)?)?;
        let (head, body) = answer.into_parts();
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, url: url.clone(), body })
    }

    /// The agent for hosts with these certificates; it keeps connections for the next request.
    fn agent(&self, ca: Option<PathBuf>, is_local: bool) -> std::result::Result<Agent, ureq::Error> {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (ca, is_local);
        if let Some(agent) = agents.get(&key) {
            return Ok(agent.clone());
        }
        let roots = match &key.0 {
            None => RootCerts::PlatformVerifier,
            Some(path) => RootCerts::from(certificates(path)?),
        };
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(roots)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("fsprov/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_send_request(Some(CONNECT))
            .timeout_recv_response(Some(ANSWER))
            .timeout_per_read(Some(SILENCE));
        // No proxy is needed to get to this machine; to others the environment says which.
        let config = if is_local { config.proxy(None) } else { config };
        let agent = Agent::new_with_config(config.build());
        agents.insert(key, agent.clone());
        Ok(agent)
    }
}

/// The certificates of a PEM file.
fn certificates(path: &Path) -> std::result::Result<Vec<Certificate<'static>>, ureq::Error> {
    let wrong = |why: String| ureq::Error::Io(std::io::Error::other(format!("certificates {}: {why}", show(path))));
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| wrong(e.to_string()))?;
    file.take(MAX_CA_BYTES).read_to_end(&mut text).map_err(|e| wrong(e.to_string()))?;
    let mut found = Vec::new();
    for item in ureq::tls::parse_pem(&text) {
        if let ureq::tls::PemItem::Certificate(one) = item? {
            found.push(one);
        }
    }
    if found.is_empty() { Err(wrong("it has no certificate".into())) } else { Ok(found) }
}

fn tls_error(error: &ureq::Error) -> Option<&rustls::Error> {
    match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}

fn is_certificate(error: &ureq::Error) -> bool {
    tls_error(error).is_some_and(|error| matches!(error, rustls::Error::InvalidCertificate(_)))
}

/// In the words of this program.
fn explain(url: &Url, error: ureq::Error) -> Failure {
    const OP: &str = "ask";
    if is_certificate(&error) {
        let why = tls_error(&error).map(ToString::to_string).unwrap_or_default();
        let hint = format!("a certificate of your own is trusted with [registry.\"{}\"] ca = \"FILE\"", url.host);
        return Error::new(Kind::Permission, OP, url, format!("its certificate is not trusted: {why}"))
            .hint(hint)
            .into();
    }
    if let Some(tls) = tls_error(&error) {
        return Failure { error: Error::new(Kind::Io, OP, url, format!("TLS failed: {tls}")), is_passing: true };
    }
    let unknown = || {
        let error = Error::new(Kind::Io, OP, url, format!("no host {} is known", url.host));
        error.hint("is the network there, and the name right?")
    };
    let (error, is_passing) = match error {
        ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            (Error::io(OP, url, e).hint("is the server running, and is this its port?"), true)
        }
        // getaddrinfo's failures have no errno and no kind of their own.
        ureq::Error::Io(e) if e.to_string().starts_with("failed to lookup address") => (unknown(), true),
        ureq::Error::Io(e) => (Error::io(OP, url, e).with_kind(Kind::Io), true),
        ureq::Error::Timeout(what) => (Error::new(Kind::Io, OP, url, format!("no answer in time ({what})")), true),
        ureq::Error::HostNotFound => (unknown(), true),
        ureq::Error::ConnectionFailed => (Error::new(Kind::Io, OP, url, "no connection"), true),
        other => (Error::new(Kind::Io, OP, url, other), false),
    };
    Failure { error, is_passing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_have_a_host_and_no_login() {
        let url = Url::parse("https://example.com:5000/v2/a?b=c").unwrap();
        assert_eq!((url.is_tls, &*url.host, &*url.path), (true, "example.com:5000", "/v2/a?b=c"));
        assert_eq!(url.join("/x").unwrap().to_string(), "https://example.com:5000/x");
        assert_eq!(url.join("http://[::1]:1/x").unwrap().to_string(), "http://[::1]:1/x");
        for bad in ["", "x", "file:///etc/passwd", "https://", "https://user:pw@host/", "//host/x", "https://a b/"] {
            assert!(Url::parse(bad).is_err() && url.join(bad).is_err(), "{bad}");
        }
        assert_eq!(encode("a/b:c d"), "a%2Fb%3Ac%20d");
    }

    #[test]
    fn who_is_elsewhere_sends_us_nowhere_on_this_machine_and_a_login_to_no_stranger() {
        let auth = HostConfig { auth: Some("login.other.net".into()), ..HostConfig::default() };
        let insecure = HostConfig { insecure: true, ..HostConfig::default() };
        let hosts = [("reg.example.com".to_owned(), auth), ("localhost:81".to_owned(), insecure)];
        let client = Client::new(hosts.into());
        let url = |text: &str| Url::parse(text).unwrap();
        for (origin, to, want) in [
            ("https://example.com/", "http://localhost:5000/x", false),
            ("https://example.com/", "https://127.0.0.1/x", false),
            ("http://example.com/", "http://[::1]:80/x", false),
            ("https://example.com/", "http://localhost:81/x", true),
            ("http://127.0.0.1:1/", "http://127.0.0.1:1/x", true),
            ("https://example.com/", "https://other.com/x", true),
        ] {
            // Nothing listens there: what of this machine is not asked for TLS is not waited for.
            let done = client.told_by(&url(origin), url(to));
            assert_eq!(done.is_ok(), want, "{origin} -> {to}");
        }
        for (registry, to, want) in [
            ("https://registry-1.docker.io/", "https://auth.docker.io/token", true),
            ("https://reg.example.com/", "https://reg.example.com/token", true),
            ("https://reg.example.com/", "http://reg.example.com/token", false),
            ("https://reg.example.com/", "https://evil.com/token", false),
            ("https://reg.example.com/", "https://example.com.evil.org/token", false),
            ("https://reg.example.com/", "https://login.other.net/token", true),
            ("https://reg2.example.com/", "https://login.other.net/token", false),
            ("http://127.0.0.1:5000/", "http://127.0.0.1:5000/token", true),
            ("http://127.0.0.1:5000/", "http://127.0.0.1:5001/token", false),
            ("https://1.2.3.4/", "https://9.9.3.4/token", false),
        ] {
            assert_eq!(client.takes_login(&url(registry), &url(to)), want, "{registry} -> {to}");
        }
    }

    #[test]
    fn only_this_machine_and_configured_hosts_may_be_plain() {
        let insecure = HostConfig { insecure: true, ..HostConfig::default() };
        let client = Client::new([("reg:80".to_owned(), insecure)].into());
        for (host, want) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.9.8.7:5000", true),
            ("[::1]:5000", true),
            ("reg:80", true),
            ("reg", false),
            ("localhost.example.com", false),
            ("127.0.0.1.example.com", false),
            ("10.0.0.1:5000", false),
            ("[::2]", false),
        ] {
            assert_eq!(client.may_be_plain(host), want, "{host}");
        }
        let refused = client.get(&Url::parse("http://example.com/").unwrap(), &[], None).err().unwrap();
        assert_eq!(refused.error.kind(), Kind::Permission);
    }
}
