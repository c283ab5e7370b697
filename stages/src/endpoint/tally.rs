//! What became of requests so far, and whose fault it is where none had an answer of use.

use std::time::{Duration, Instant};

use crate::StageError;

/// Reasons of new tries that say more than their words.
pub const NO_CONNECTION: &str = "no connection";
pub const TOO_LATE: &str = "no answer in time";
pub const NOT_JSON: &str = "not JSON";
pub const OTHER_ANSWER: &str = "another answer than was asked for";

/// When a failed try is told though others may do better: as one of so many, or so long after the first request.
const MISSES: usize = 3;
const SILENT: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub struct Tally {
    answered: usize,
    /// Something answered there, whatever it was.
    is_reached: bool,
    /// When the first request was sent.
    first: Option<Instant>,
    /// Failed tries before the first answer of use.
    missed: usize,
    /// The user heard that there is no answer yet.
    told: bool,
    /// There are answers from earlier, of this server or of another with the same model.
    answered_earlier: bool,
    /// For good, those refused among them.
    failed: usize,
    refused: usize,
    /// Reasons of new tries, in order of first appearance.
    again: Vec<(String, usize)>,
    /// Requests that failed for good since the server last had an answer to any, without one to their last try.
    silent: usize,
    /// Reason and message of the last try of the last request that failed.
    last: (String, String),
}

impl Tally {
    /// A request is sent.
    pub fn asked(&mut self, now: Instant) {
        self.first.get_or_insert(now);
    }

    /// A try failed and there will be another; whether the user should hear that no request was answered yet.
    pub fn missed(&mut self, now: Instant) -> bool {
        if self.told || self.answered + self.refused > 0 {
            return false;
        }
        self.missed += 1;
        let is_late = self.first.is_some_and(|first| now.saturating_duration_since(first) >= SILENT);
        self.told = is_late || self.missed >= MISSES;
        self.told
    }

    /// An answer begins, of use or of none.
    pub fn reached(&mut self) {
        self.is_reached = true;
    }

    pub fn is_reached(&self) -> bool {
        self.is_reached
    }

    pub fn answered(&mut self) {
        self.silent = 0;
        self.answered += 1;
    }

    pub fn answered_earlier(&mut self) {
        self.answered_earlier = true;
    }

    /// The server had an answer, though of no use: it runs.
    pub fn heard(&mut self) {
        self.silent = 0;
    }

    pub fn refused(&mut self) {
        self.silent = 0;
        self.failed += 1;
        self.refused += 1;
    }

    /// The last refusal was no failure.
    pub fn forget_refusal(&mut self) {
        self.failed = self.failed.saturating_sub(1);
        self.refused = self.refused.saturating_sub(1);
    }

    pub fn tried_again(&mut self, reason: &str) {
        match self.again.iter_mut().find(|(known, _)| known == reason) {
            Some((_, count)) => *count += 1,
            None => self.again.push((reason.to_owned(), 1)),
        }
    }

    /// A request has no answer of use after all its tries. `heard`: the server had one to the last.
    pub fn failed(&mut self, reason: String, message: String, heard: bool) {
        self.failed += 1;
        self.silent = if heard { 0 } else { self.silent + 1 };
        self.last = (reason, message);
    }

    /// The end of all requests, where so many in a row had no answer that the server must be down.
    pub fn down(&self, many: usize) -> Option<StageError> {
        let (reason, message) = &self.last;
        let down = || StageError::Network {
            message: format!("{} requests in a row had no answer; the last: {message}", self.silent),
            help: Some(format!("{}; what was answered until now is kept, and a rerun goes on", what_to_do(reason))),
        };
        (self.silent >= many).then(down)
    }

    /// What to do about failed rows that are the server's fault: it had an answer of use to nothing.
    pub fn fault(&self, address: &str) -> Option<String> {
        if !self.is_in_vain() {
            return None;
        }
        let whose = match self.failed {
            1 => "the one request, which may be its fault and not the row's",
            _ => "any request, which is its fault and not the rows'",
        };
        Some(format!(
            "{address} had no answer of use to {whose}: {}; a rerun asks for these rows alone",
            what_to_do(&self.last.0)
        ))
    }

    /// Requests failed, and nothing shows that others would not. Where there are answers from earlier, those are left
    /// that had none: they may all be rows over which the server stumbles.
    pub fn is_in_vain(&self) -> bool {
        self.answered == 0 && !self.answered_earlier && self.refused == 0 && self.failed > 0
    }

    /// What became of all requests, in words, where there is something to tell.
    pub fn report(&self, address: &str) -> Option<String> {
        if self.again.is_empty() && self.failed == 0 {
            return None;
        }
        let mut text = format!("{address}: {} requests answered", self.answered);
        if self.failed > 0 {
            text.push_str(&format!(", {} failed", self.failed));
        }
        if !self.again.is_empty() {
            let again: usize = self.again.iter().map(|(_, n)| n).sum();
            let reasons: Vec<String> = self.again.iter().map(|(reason, n)| format!("{n} × {reason}")).collect();
            text.push_str(&format!("; {again} tried again ({})", reasons.join(", ")));
        }
        if self.is_in_vain() && self.failed > 1 {
            text.push_str("; that is the server's fault and not the rows'");
        }
        Some(text)
    }
}

fn what_to_do(reason: &str) -> &'static str {
    match reason {
        NO_CONNECTION => "nobody listens there: start the server, or mend the address",
        TOO_LATE => "the server is too slow or hangs: raise `timeout`, or lower `concurrency`",
        NOT_JSON => {
            "something else answers there, a proxy or a login page perhaps: check the address, which ends before \
             `/chat/completions` or `/embeddings`"
        }
        OTHER_ANSWER => "its interface is not OpenAI's, or its model is of another kind: check the address and `model`",
        "status 429" => "a limit or quota of the server is used up: wait, raise it, or lower `concurrency`",
        "status 500" | "status 501" => "it fails whatever it is asked: see the server's log, and check `model`",
        _ => "see whether the server runs, and speaks OpenAI's interface",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_nothing_is_answered_yet_is_told_once_and_early() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let asked = || {
            let mut tally = Tally::default();
            tally.asked(start);
            tally.asked(after(4));
            tally
        };
        let mut many = asked();
        assert_eq!([0, 1, 2, 3, 60].map(|at| many.missed(after(at))), [false, false, true, false, false]);
        let mut slow = asked();
        assert_eq!([4, 5, 6].map(|at| slow.missed(after(at))), [false, true, false]);
        for heard in [Tally::answered, Tally::refused] {
            let mut tally = asked();
            heard(&mut tally);
            assert_eq!([1, 2, 3, 60].map(|at| tally.missed(after(at))), [false; 4], "others are answered");
        }
    }
}
