//! When a request is tried again: later and later, with some chance in it, or when the server says.

use std::time::{Duration, SystemTime};

use rand::Rng;

/// The longest that a server's `Retry-After` is followed.
const LONGEST_ASKED: Duration = Duration::from_secs(900);

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

/// The wait that a `Retry-After` header asks for: seconds, or a date.
pub fn retry_after(header: Option<&str>, now: SystemTime) -> Option<Duration> {
    let text = header?.trim();
    let wait = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok()?,
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(LONGEST_ASKED))
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
    fn seconds_and_dates() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let asked = |header| retry_after(header, now).map(|wait| wait.as_millis());
        assert_eq!(asked(Some("7")), Some(7000));
        assert_eq!(asked(Some(" 0.25 ")), Some(250));
        assert_eq!(asked(Some("Sun, 06 Nov 1994 08:50:37 GMT")), Some(60_000));
        assert_eq!(asked(Some("Sun, 06 Nov 1994 08:48:37 GMT")), Some(0));
        assert_eq!(asked(Some("1000000")), Some(900_000));
        assert_eq!((asked(None), asked(Some("soon")), asked(Some("-1"))), (None, None, None));
    }
}
