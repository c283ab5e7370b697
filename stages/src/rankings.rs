//! Writing the output `rankings`, some users at a time: what the kinds that rank all users by themselves share.

use std::ops::Range;

use crate::{
    StageContext, StageError,
    artifact::{Ranking, Split, jsonl},
};

/// Users ranked between two looks at the stop flag.
const USERS: usize = 4096;

/// Writes, for each split and the number of its users, a list for each of these. `rank` makes those of some users, given
/// by their numbers.
///
/// # Errors
/// The file cannot be written, or the stage was asked to stop.
pub fn write(
    cx: &mut StageContext,
    splits: &[(Split, usize)],
    mut rank: impl FnMut(Split, Range<usize>) -> Vec<Ranking>,
) -> Result<(), StageError> {
    let mut out = jsonl::Writer::create(cx.output("rankings")?)?;
    let total = splits.iter().map(|(_, users)| *users as u64).sum();
    let mut done = 0;
    for &(split, users) in splits {
        for start in (0..users).step_by(USERS) {
            cx.check_stop()?;
            let some = start..(start + USERS).min(users);
            done += some.len() as u64;
            rank(split, some).iter().try_for_each(|ranking| out.write(ranking))?;
            cx.progress(done, total, "user");
        }
    }
    out.finish()
}
