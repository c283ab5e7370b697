//! When a request is tried again: later and later, with some chance in it, or when the server says.

use std::{
    fmt,
    time::{Duration, Instant, SystemTime},
};

use rand::Rng;

/// The longest that a server's `Retry-After` is followed.
const LONGEST_ASKED: Duration = Duration::from_secs(900);

/// A wait that is longer than this is told.
const SILENT: Duration = Duration::from_secs(5);

/// How long a wait that was told stands for others, unless they are much longer.
const TOLD_FOR: Duration = Duration::from_secs(60);

/// Waits that double from `first` up to `longest`.
#[derive(Debug, Clone, Copy)]
pub struct Delays {
    pub first: Duration,
    pub longest: Duration,
}

impl Default for Delays {
    fn default() -> Self {
        Self { first: Duration::from_millis(500), longest: Duration::from_secs(30) }
    }
}

impl Delays {
    /// The wait after try `attempt` (counted from 0): between half of its length and the whole, so that requests that
    /// failed together do not come back together.
    pub fn after(&self, attempt: u32) -> Duration {
        let whole = self.first.saturating_mul(1 << attempt.min(20)).min(self.longest);
        whole.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

/// The waits that a server asks for; the one that ends last holds all requests back.
#[derive(Debug, Default)]
pub struct Pause {
    until: Option<Instant>,
    told: Option<Told>,
}

/// A wait that the user heard of.
#[derive(Debug, Clone, Copy)]
struct Told {
    at: Instant,
    wait: Duration,
}

impl Pause {
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    /// The server asks for `wait` from `now` on; whether the user should hear of it: it is long, no wait that was told
    /// ends at about the same time, and none was told just now that was not much shorter. Requests that were under way
    /// together bring one wait each, and some servers ask for the same every time.
    pub fn extend(&mut self, wait: Duration, now: Instant) -> bool {
        let end = now + wait;
        self.until = Some(self.until.map_or(end, |until| until.max(end)));
        let considerable = SILENT.max(wait / 4);
        let is_news = |told: Told| {
            end.saturating_duration_since(told.at + told.wait) > considerable
                && (now.saturating_duration_since(told.at) >= TOLD_FOR || wait > told.wait * 2)
        };
        let news = wait > SILENT && self.told.is_none_or(is_news);
        if news {
            self.told = Some(Told { at: now, wait });
        }
        news
    }
}

/// A wait that a server asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryAfter {
    asked: Duration,
    /// How long is waited.
    pub wait: Duration,
}

impl RetryAfter {
    /// Whether it is told.
    pub fn is_long(&self) -> bool {
        self.wait > SILENT
    }
}

impl fmt::Display for RetryAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |wait: Duration| wait.as_secs_f64().ceil();
        write!(f, "the server asks to wait {} s: all requests wait ", seconds(self.asked))?;
        if self.asked > self.wait {
            write!(f, "{} s, the longest that is waited", seconds(self.wait))
        } else {
            f.write_str("until then")
        }
    }
}

/// What a `Retry-After` header asks for: seconds, or a date.
pub fn retry_after(header: Option<&str>, now: SystemTime) -> Option<RetryAfter> {
    let text = header?.trim();
    let asked = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok()?,
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(RetryAfter { asked, wait: asked.min(LONGEST_ASKED) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest() {
        let delays = Delays { first: Duration::from_millis(100), longest: Duration::from_secs(1) };
        for (attempt, whole) in [(0, 100), (1, 200), (3, 800), (4, 1000), (60, 1000)] {
            for _ in 0..20 {
                let wait = delays.after(attempt).as_millis();
                assert!((whole / 2..=whole).contains(&wait), "{attempt}: {wait}");
            }
        }
    }

    #[test]
    fn a_long_pause_is_told_once_and_again_where_it_grows() {
        let (mut pause, start) = (Pause::default(), Instant::now());
        let mut told = |wait, after| pause.extend(Duration::from_secs(wait), start + Duration::from_secs(after));
        assert!(!told(5, 0), "a short one");
        assert!(told(600, 0));
        assert!(!told(600, 2) && !told(30, 3) && !told(600, 100), "the same, or shorter");
        assert!(told(900, 100), "longer");
        assert!(told(10, 1000), "the next");
        assert_eq!(pause.until(), Some(start + Duration::from_secs(1010)));
        pause.extend(Duration::from_secs(1), start);
        assert_eq!(pause.until(), Some(start + Duration::from_secs(1010)));
    }

    #[test]
    fn the_same_pause_again_and_again_is_told_once_a_minute() {
        let (mut pause, start) = (Pause::default(), Instant::now());
        let mut told = |wait, after| pause.extend(Duration::from_secs(wait), start + Duration::from_secs(after));
        let rounds: Vec<u64> = (0..=128).step_by(8).filter(|after| told(8, *after)).collect();
        assert_eq!(rounds, [0, 64, 128]);
        assert!(!told(16, 136), "not much longer");
        assert!(told(17, 136), "much longer");
    }

    #[test]
    fn seconds_and_dates() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let asked = |header| retry_after(header, now).map(|asked| asked.wait.as_millis());
        assert_eq!(asked(Some("7")), Some(7000));
        assert_eq!(asked(Some(" 0.25 ")), Some(250));
        assert_eq!(asked(Some("Sun, 06 Nov 1994 08:50:37 GMT")), Some(60_000));
        assert_eq!(asked(Some("Sun, 06 Nov 1994 08:48:37 GMT")), Some(0));
        assert_eq!(asked(Some("1000000")), Some(900_000));
        assert_eq!((asked(None), asked(Some("soon")), asked(Some("-1"))), (None, None, None));
    }

    #[test]
    fn a_wait_that_is_cut_short_says_what_was_asked_for() {
        let said = |header| retry_after(Some(header), SystemTime::UNIX_EPOCH).unwrap().to_string();
        assert_eq!(said("900"), "the server asks to wait 900 s: all requests wait until then");
        let cut = "the server asks to wait 3600 s: all requests wait 900 s, the longest that is waited";
        assert_eq!(said("3600"), cut);
        assert_eq!(said("Thu, 01 Jan 1970 01:00:00 GMT"), cut);
    }
}
