//! A reader of archives that was taken over, played by itself. Of test builds alone.

use super::{Answer, Order, Report};
use crate::walls::escapes::{self, Attempt};

fn told(what: &str) -> Option<String> {
    fail::eval(what, |told| told).flatten()
}

/// Do what the fault points say: `decoder.escapes` and `unpacker.escapes` try to get out; `.hog` takes what it is given the name of, without end.
pub(super) fn play(order: &Order) -> Vec<Attempt> {
    let who = match order {
        Order::Decode(_) => "decoder",
        Order::Unpack(_) => "unpacker",
    };
    match told(&format!("{who}.hog")).as_deref() {
        Some("memory") => {
            let mut all: Vec<Vec<u8>> = Vec::new();
            loop {
                all.push(vec![1; 1 << 20]);
            }
        }
        Some("time") => loop {
            std::hint::spin_loop();
        },
        _ => {}
    }
    told(&format!("{who}.escapes")).map(|told| escapes::attempt_as_importer(&told)).unwrap_or_default()
}

/// An unpacker that says it is done, and has read nothing: `unpacker.lies`.
pub(super) fn lie(order: &Order) -> Option<Report> {
    let lies = matches!(order, Order::Unpack(_)) && told("unpacker.lies").is_some();
    lies.then(|| Report::Unpacked(super::work::Unpacked::default()))
}

/// What came of it, on the log.
pub(super) fn tell(answer: &Answer) {
    if !answer.escapes.is_empty() {
        let out: Vec<_> = answer.escapes.iter().filter(|a| a.escaped).map(|a| &*a.what).collect();
        log::warn!(
            "escapes: {} tried, {} succeeded {out:?} behind {:?}",
            answer.escapes.len(),
            out.len(),
            answer.walls
        );
    }
}
