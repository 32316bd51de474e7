//! A small HTTP server for lies: one thread a connection, the answers a closure's. On 127.0.0.1, and gone when it is dropped.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) path: String,
    /// `name: value` lines, names in lowercase.
    headers: Vec<(String, String)>,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }
}

/// What is answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// What Content-Length says; None: what is true.
    pub(crate) length: Option<u64>,
    /// Sent again and again after the body, this many times.
    pub(crate) repeat: usize,
    /// Keep the connection open in silence after the body, until the server ends.
    pub(crate) hang: bool,
}

impl Answer {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Answer { status, body: body.into(), ..Answer::default() }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

type Handler = dyn Fn(&Asked) -> Answer + Send + Sync;

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    ended: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(handler: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        Server::at("127.0.0.1:0", handler)
    }

    pub(crate) fn at(address: &str, handler: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(address).unwrap_or_else(|e| panic!("listen at {address}: {e}"));
        let address = listener.local_addr().expect("address");
        let (asked, ended) = (Arc::<Mutex<Vec<Asked>>>::default(), Arc::<AtomicBool>::default());
        let (to, end) = (asked.clone(), ended.clone());
        let handler: Arc<Handler> = Arc::new(handler);
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                let (handler, to, end) = (handler.clone(), to.clone(), end.clone());
                std::thread::spawn(move || {
                    let _ = serve(&stream, &*handler, &to, &end);
                });
            }
        });
        Server { address, asked, ended, accepting: Some(accepting) }
    }

    /// Every request since the last time this was called.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.asked.lock().expect("lock"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the accepting thread: when it has ended, nobody listens.
        if let (Ok(_), Some(accepting)) = (TcpStream::connect(self.address), self.accepting.take()) {
            let _ = accepting.join();
        }
    }
}

fn serve(stream: &TcpStream, handler: &Handler, asked: &Mutex<Vec<Asked>>, end: &AtomicBool) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let line = String::from_utf8_lossy(&line).into_owned();
        let mut words = line.split_whitespace();
        // A TLS hello is none: the connection ends.
        let (Some("GET"), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
        let mut request = Asked { path: path.to_owned(), headers: Vec::new() };
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            request.headers.push((name.to_lowercase(), value.to_owned()));
        }
        asked.lock().expect("lock").push(request.clone());
        let answer = handler(&request);
        let length = answer.length.unwrap_or((answer.body.len() * (answer.repeat + 1)) as u64);
        let mut head = format!("HTTP/1.1 {} -\r\nContent-Length: {length}\r\n", answer.status);
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut out = stream;
        out.write_all(format!("{head}\r\n").as_bytes())?;
        for _ in 0..=answer.repeat {
            out.write_all(&answer.body)?;
        }
        while answer.hang && !end.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        if answer.hang || answer.length.is_some() {
            return Ok(());
        }
    }
}
