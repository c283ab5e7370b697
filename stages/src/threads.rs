//! A rayon pool of exactly the leased number of threads, so that a stage never takes more cores than it was given.

use crate::{StageContext, StageError};

/// The pool of one attempt; run parallel work inside `pool.install(|| …)`.
///
/// # Errors
/// The system refuses to start threads.
pub fn pool(cx: &StageContext) -> Result<rayon::ThreadPool, StageError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(cx.threads())
        .build()
        .map_err(|e| StageError::io("start threads for", "this stage", std::io::Error::other(e)))
}
