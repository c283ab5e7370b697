//! Whether a failed attempt is worth another one, and how long to wait before it.

use std::time::Duration;

use grlm_stages::Failure;

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    GiveUp,
    After(Duration),
}

/// How often a stage is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RetryPolicy {
    /// `retries:` of the pipeline. Unset means what the class of failure is worth by itself: see [`Self::allowed`].
    pub retries: Option<u32>,
    /// The stage can make its batches smaller, so that memory that ran out may suffice next time.
    pub shrinks: bool,
}

impl RetryPolicy {
    const LONGEST: Duration = Duration::from_secs(60);

    /// How many retries this class of failure gets.
    pub fn allowed(self, failure: Failure) -> u32 {
        match failure {
            // The same input gives the same error.
            Failure::WrongInput | Failure::Stopped | Failure::Bug => 0,
            Failure::OutOfMemory if self.shrinks => self.retries.unwrap_or(3),
            Failure::Environment | Failure::Killed | Failure::DeviceLost => self.retries.unwrap_or(1),
            Failure::OutOfMemory | Failure::Timeout | Failure::Command | Failure::FailedRows => {
                self.retries.unwrap_or(0)
            }
        }
    }

    /// Decides after attempt number `attempt` (counted from 1) failed.
    pub fn decide(self, failure: Failure, attempt: u32) -> Retry {
        if attempt > self.allowed(failure) {
            return Retry::GiveUp;
        }
        let first = match failure {
            // What helps is a smaller batch, not time.
            Failure::OutOfMemory if self.shrinks => Duration::ZERO,
            Failure::Environment => Duration::from_secs(2),
            _ => Duration::from_secs(1),
        };
        let doubled = first.saturating_mul(2u32.saturating_pow(attempt.saturating_sub(1)));
        Retry::After(doubled.min(Self::LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Failure; 10] = [
        Failure::WrongInput,
        Failure::OutOfMemory,
        Failure::Timeout,
        Failure::Killed,
        Failure::Stopped,
        Failure::Environment,
        Failure::Command,
        Failure::FailedRows,
        Failure::DeviceLost,
        Failure::Bug,
    ];

    #[test]
    fn classes_differ() {
        let plain = RetryPolicy::default();
        let tried_again = |policy: RetryPolicy| -> Vec<Failure> {
            ALL.into_iter().filter(|f| policy.decide(*f, 1) != Retry::GiveUp).collect()
        };
        assert_eq!(tried_again(plain), [Failure::Killed, Failure::Environment, Failure::DeviceLost]);
        assert_eq!(tried_again(RetryPolicy { retries: Some(0), shrinks: true }), []);
        assert_eq!(tried_again(RetryPolicy { retries: Some(2), shrinks: false }), {
            let programs = [Failure::Command, Failure::FailedRows, Failure::DeviceLost];
            [&[Failure::OutOfMemory, Failure::Timeout, Failure::Killed, Failure::Environment][..], &programs].concat()
        });
        let shrinking = RetryPolicy { retries: None, shrinks: true };
        assert_eq!(shrinking.decide(Failure::OutOfMemory, 3), Retry::After(Duration::ZERO));
        assert_eq!(shrinking.decide(Failure::OutOfMemory, 4), Retry::GiveUp);
    }

    #[test]
    fn waits_double_up_to_a_minute_and_attempts_end() {
        let policy = RetryPolicy { retries: Some(40), shrinks: false };
        let waits: Vec<_> = (1..=40).map(|attempt| policy.decide(Failure::Command, attempt)).collect();
        let seconds = |s| Retry::After(Duration::from_secs(s));
        assert_eq!(waits[..7], [1, 2, 4, 8, 16, 32, 60].map(seconds));
        assert_eq!(waits[39], seconds(60));
        assert_eq!(policy.decide(Failure::Command, 41), Retry::GiveUp);
    }
}
