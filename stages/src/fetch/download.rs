//! Getting a file over HTTP in spite of a bad line: tries with growing pauses, ranges, several addresses.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ureq::{Agent, http::HeaderMap};

use super::Digest;
use crate::{StageContext, StageError};

/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Progress is told this often.
const TELL: Duration = Duration::from_millis(500);

/// How downloads are done.
pub(super) struct Downloader {
    agent: Agent,
    tries: u32,
    first_pause: Duration,
}

/// Why one try gave no file.
enum Trouble {
    /// Another try may do better, after this long if the server said so.
    Passing { message: String, wait: Option<Duration> },
    /// This address will not give the file.
    Final { message: String },
    /// Not the address's fault.
    Own(StageError),
}

/// An address, and what became of it so far.
struct Candidate<'a> {
    address: &'a str,
    part: PathBuf,
    last: Option<String>,
    refused: bool,
}

impl Downloader {
    /// `patience` is the longest wait for the next byte.
    pub fn new(tries: u32, patience: Duration) -> Self {
        Self::with_config(Agent::config_builder(), tries, patience, Duration::from_secs(1))
    }

    fn with_config(
        config: ureq::config::ConfigBuilder<ureq::typestate::AgentScope>,
        tries: u32,
        patience: Duration,
        first_pause: Duration,
    ) -> Self {
        let config = config
            .http_status_as_error(false)
            // A range of a compressed stream is of no use.
            .accept_encoding("identity")
            .user_agent(concat!("grlm/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(patience))
            .timeout_per_read(Some(patience))
            .build();
        Self { agent: Agent::new_with_config(config), tries, first_pause }
    }

    /// The file, in the stage's scratch folder, which keeps what came so far for the next attempt.
    ///
    /// # Errors
    /// No address gave the file, or none gave the wanted one; stopped on request; the disk.
    pub fn download(
        &self,
        addresses: &[&str],
        digest: Option<&Digest>,
        cx: &mut StageContext,
    ) -> Result<PathBuf, StageError> {
        // With a digest all addresses hold the same bytes, and one may go on where another stopped.
        let part = |i: usize| cx.scratch().join(if digest.is_some() { "part".into() } else { format!("part-{i}") });
        let mut candidates: Vec<Candidate> = addresses
            .iter()
            .enumerate()
            .map(|(i, address)| Candidate { address, part: part(i), last: None, refused: false })
            .collect();
        let mut asked_to_wait = None;
        let mut different = None;
        for round in 0..self.tries {
            if round > 0 {
                let pause = self.first_pause.saturating_mul(2u32.saturating_pow(round - 1));
                wait(asked_to_wait.take().unwrap_or(pause).min(LONGEST_PAUSE), cx)?;
            }
            for candidate in candidates.iter_mut().filter(|c| !c.refused) {
                cx.check_stop()?;
                let resumed = fs::metadata(&candidate.part).is_ok_and(|m| m.len() > 0);
                match self.attempt(candidate, digest.is_some(), cx) {
                    Ok(()) => match digest.map_or(Ok(()), |d| d.check(&candidate.part)) {
                        Ok(()) => return Ok(candidate.part.clone()),
                        Err(error) => {
                            forget(&candidate.part);
                            // What was there before may have been the wrong half.
                            candidate.refused = !resumed;
                            let error = error.of(candidate.address);
                            candidate.last = Some(error.to_string());
                            different = Some(error);
                        }
                    },
                    Err(Trouble::Own(error)) => return Err(error),
                    Err(Trouble::Final { message }) => {
                        candidate.refused = true;
                        candidate.last = Some(message);
                    }
                    Err(Trouble::Passing { message, wait }) => {
                        asked_to_wait = wait;
                        candidate.last = Some(message);
                    }
                }
            }
            if candidates.iter().all(|c| c.refused) {
                break;
            }
        }
        if let (Some(error), true) = (different, candidates.len() == 1) {
            return Err(error);
        }
        let told: Vec<String> =
            candidates.iter().map(|c| format!("{}: {}", c.address, c.last.as_deref().unwrap_or("not tried"))).collect();
        let message = told.join("; ");
        let help = "without network, put the file on this machine and connect it: `--set STAGE.inputs.file.file=PATH`";
        Err(if candidates.iter().all(|c| c.refused) {
            StageError::params(message).help(format!("is the address right? {help}"))
        } else {
            StageError::Network { message, help: Some(help.into()) }
        })
    }

    /// One request; what it gives is appended to the part that is there.
    fn attempt(&self, candidate: &Candidate, pinned: bool, cx: &mut StageContext) -> Result<(), Trouble> {
        let Candidate { address, part, .. } = candidate;
        let validator = fs::read_to_string(validator_path(part)).ok();
        let mut have = fs::metadata(part).map_or(0, |m| m.len());
        if have > 0 && !pinned && validator.is_none() {
            // Nothing says that what is there is the beginning of what would come.
            forget(part);
            have = 0;
        }
        let mut request = self.agent.get(*address);
        if have > 0 {
            request = request.header("Range", format!("bytes={have}-"));
            if let Some(validator) = &validator {
                request = request.header("If-Range", validator);
            }
        }
        let response = request.call().map_err(|e| transport(&e))?;
        let headers = response.headers().clone();
        match response.status().as_u16() {
            200 => have = 0,
            206 if range_start(&headers) == Some(have) => {}
            206 | 416 if whole_size(&headers) == Some(have) && have > 0 => return Ok(()),
            206 | 416 => {
                forget(part);
                return Err(Trouble::Passing { message: "the server sent another range".into(), wait: None });
            }
            status @ (408 | 425 | 429 | 500..=599) => {
                let wait = text_of(&headers, "retry-after").and_then(|s| s.parse().ok()).map(Duration::from_secs);
                return Err(Trouble::Passing { message: answered(status), wait });
            }
            status => return Err(Trouble::Final { message: answered(status) }),
        }
        let own = |action, e| Trouble::Own(StageError::io(action, part, e));
        let mut file = if have == 0 {
            let _ = fs::remove_file(validator_path(part));
            if let Some(tag) = text_of(&headers, "etag").filter(|tag| !tag.starts_with("W/")) {
                fs::write(validator_path(part), tag).map_err(|e| own("write", e))?;
            }
            File::create(part)
        } else {
            OpenOptions::new().append(true).open(part)
        }
        .map_err(|e| own("write", e))?;
        let length: Option<u64> = text_of(&headers, "content-length").and_then(|s| s.parse().ok());
        let total = length.map_or(0, |length| have + length);
        let mut body = response.into_body().into_reader();
        let (mut done, mut told) = (have, Instant::now());
        let mut buffer = vec![0; 64 << 10];
        cx.progress(done, total, "byte");
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => {
                    return Err(Trouble::Passing { message: format!("broke off at byte {done}: {e}"), wait: None });
                }
            };
            file.write_all(&buffer[..n]).map_err(|e| own("write", e))?;
            done += n as u64;
            if told.elapsed() >= TELL {
                told = Instant::now();
                cx.progress(done, total, "byte");
                cx.check_stop().map_err(Trouble::Own)?;
            }
        }
        cx.progress(done, total.max(done), "byte");
        if length.is_some() && done < total {
            return Err(Trouble::Passing { message: format!("broke off at byte {done} of {total}"), wait: None });
        }
        Ok(())
    }
}

/// The server's tag of the content that a part is the beginning of.
fn validator_path(part: &Path) -> PathBuf {
    part.with_extension("etag")
}

fn forget(part: &Path) {
    let _ = fs::remove_file(part);
    let _ = fs::remove_file(validator_path(part));
}

fn answered(status: u16) -> String {
    let reason = ureq::http::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or_default();
    format!("the server answered {status} {reason}").trim_end().to_owned()
}

fn transport(error: &ureq::Error) -> Trouble {
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => Trouble::Final { message: format!("not an address: {error}") },
        ureq::Error::HostNotFound => Trouble::Passing { message: "the host's name is not known".into(), wait: None },
        ureq::Error::Io(error) => Trouble::Passing { message: error.to_string(), wait: None },
        other => Trouble::Passing { message: other.to_string(), wait: None },
    }
}

fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// `bytes 100-199/200` → 100.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    text_of(headers, "content-range")?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// `bytes */200` → 200.
fn whole_size(headers: &HeaderMap) -> Option<u64> {
    text_of(headers, "content-range")?.rsplit_once('/')?.1.parse().ok()
}

/// Sleeps, but not through a stop.
fn wait(pause: Duration, cx: &StageContext) -> Result<(), StageError> {
    let until = Instant::now() + pause;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        cx.check_stop()?;
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
    cx.check_stop()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::TcpListener};

    use super::{
        super::server::{Answer, Server},
        *,
    };
    use crate::{Failure, StopFlag};

    fn content() -> Vec<u8> {
        (0..300_000u32).map(|i| (i % 251) as u8).collect()
    }

    fn digest() -> Digest {
        format!("blake3:{}", blake3::hash(&content()).to_hex()).parse().unwrap()
    }

    struct Scratch(tempfile::TempDir);

    impl Scratch {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn download(&self, addresses: &[&str], digest: Option<&Digest>) -> Result<Vec<u8>, StageError> {
            let scratch = self.0.path().to_owned();
            let nothing = BTreeMap::new;
            let mut cx = StageContext::new(nothing(), nothing(), scratch, 1, vec![], StopFlag::default(), |_| {});
            let config = Agent::config_builder().proxy(None);
            let patience = Duration::from_secs(5);
            Downloader::with_config(config, 4, patience, Duration::from_millis(1))
                .download(addresses, digest, &mut cx)
                .map(|part| fs::read(part).unwrap())
        }
    }

    #[test]
    fn a_broken_download_goes_on_where_it_stopped() {
        let server = Server::start(&content(), vec![Answer::BreakAfter(100_000), Answer::BreakAfter(50_000)]);
        let got = Scratch::new().download(&[&server.address("x")], Some(&digest())).unwrap();
        assert!(got == content());
        let ranges: Vec<Option<u64>> = server.requests().iter().map(|r| r.range_start).collect();
        assert_eq!((ranges.len(), ranges[0]), (3, None));
        let (second, third) = (ranges[1].unwrap(), ranges[2].unwrap());
        assert!(0 < second && second <= 100_000 && second < third && third <= 150_000, "{ranges:?}");
    }

    #[test]
    fn the_next_attempt_and_a_mirror_go_on_too() {
        let scratch = Scratch::new();
        let bad = Server::start(&content(), vec![Answer::BreakAfter(100_000), Answer::Status(404)]);
        assert!(scratch.download(&[&bad.address("x")], Some(&digest())).is_err());
        let good = Server::start(&content(), vec![]);
        assert!(scratch.download(&[&good.address("x")], Some(&digest())).unwrap() == content());
        assert!(good.requests()[0].range_start.is_some_and(|from| from > 0));
    }

    #[test]
    fn a_server_without_ranges_and_one_in_trouble_are_coped_with() {
        let answers = vec![Answer::Status(503), Answer::BreakAfter(100_000), Answer::WholeAgain];
        let server = Server::start(&content(), answers);
        assert!(Scratch::new().download(&[&server.address("x")], Some(&digest())).unwrap() == content());
        assert_eq!(server.requests().len(), 3);
    }

    #[test]
    fn a_wrong_half_is_thrown_away_once() {
        let scratch = Scratch::new();
        fs::write(scratch.0.path().join("part"), vec![9; 1000]).unwrap();
        let server = Server::start(&content(), vec![]);
        assert!(scratch.download(&[&server.address("x")], Some(&digest())).unwrap() == content());
        let asked: Vec<Option<u64>> = server.requests().iter().map(|r| r.range_start).collect();
        assert_eq!(asked, [Some(1000), None]);
    }

    #[test]
    fn without_a_digest_only_the_same_content_is_continued() {
        let scratch = Scratch::new();
        let server = Server::start(&content(), vec![Answer::BreakAfter(100_000)]);
        assert!(scratch.download(&[&server.address("x")], None).unwrap() == content());
        assert!(server.requests()[1].if_range.as_deref().is_some_and(|tag| tag.starts_with('"')));
        fs::write(scratch.0.path().join("part-0"), b"stale").unwrap();
        fs::remove_file(scratch.0.path().join("part-0.etag")).ok();
        fs::remove_file(validator_path(&scratch.0.path().join("part-0"))).ok();
        let server = Server::start(&content(), vec![]);
        assert!(scratch.download(&[&server.address("x")], None).unwrap() == content());
        assert_eq!(server.requests()[0].range_start, None);
    }

    #[test]
    fn a_whole_part_is_not_fetched_again() {
        let scratch = Scratch::new();
        fs::write(scratch.0.path().join("part"), content()).unwrap();
        let server = Server::start(&content(), vec![]);
        assert!(scratch.download(&[&server.address("x")], Some(&digest())).unwrap() == content());
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn without_a_network_the_error_says_what_to_do() {
        // A port that was free a moment ago: nobody listens.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = Scratch::new().download(&[&format!("http://127.0.0.1:{port}/x")], Some(&digest())).unwrap_err();
        assert_eq!(error.failure(), Failure::Environment);
        assert!(error.to_string().contains(&port.to_string()), "{error}");
        assert!(error.help_text().unwrap().contains("inputs.file.file=PATH"));
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let stop = StopFlag::default();
        stop.stop();
        let nothing = BTreeMap::new;
        let cx = StageContext::new(nothing(), nothing(), PathBuf::new(), 1, vec![], stop, |_| {});
        assert!(matches!(wait(Duration::from_secs(600), &cx), Err(StageError::Stopped)));
    }
}
