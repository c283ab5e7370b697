//! Who is asked what: the prompt of every user and split, and what must not be among the answers.

use crate::{
    Compat, StageError,
    artifact::{ChatTemplate, Holdout, Id2Meta, ItemId, SftFormat, Split, TidRecord, UserId},
    lm::{HistoryPrompt, Layout},
    sft::rec_text::{self, Place, TID_LABEL},
};

use super::{Params, catalogue::Tids};

/// One list to make.
pub struct Query {
    pub user: UserId,
    pub split: Split,
    pub target: ItemId,
    /// Tokens of the whole prompt.
    pub prompt: Vec<u32>,
    /// How many of the oldest items the prompt has no room for.
    pub dropped: usize,
    /// Items that must not be recommended.
    pub seen: Vec<ItemId>,
    /// TIDs that no other item has.
    pub left_out: Vec<u32>,
}

/// The queries of all users, split after split. `room` is the number of tokens that an answer may take.
///
/// # Errors
/// A user has an item that `id2meta` lacks, or a prompt cannot be made.
pub fn build(
    params: &Params,
    layout: &Layout,
    id2meta: &Id2Meta,
    tids: &Tids,
    holdout: &[Holdout],
    room: usize,
) -> Result<Vec<Query>, StageError> {
    if params.compat == Compat::Reference && layout.settings().format == SftFormat::Compact {
        return Err(StageError::params("`compat: reference` asks in the format `text`, and the model knows `compact`")
            .help("leave `compat` out"));
    }
    let mut queries = Vec::with_capacity(holdout.len() * params.splits.len());
    for &split in &params.splits {
        for user in holdout {
            let also = (split == Split::Test).then_some(&user.valid);
            let history: Vec<&ItemId> = user.history.iter().chain(also).collect();
            let records: Vec<&TidRecord> = history
                .iter()
                .map(|item| {
                    id2meta.get(item.as_str()).ok_or_else(|| {
                        StageError::params(format!("user `{}` has item `{item}`, which `id2meta` lacks", user.user))
                            .help("`holdout` and `id2meta` must come from the same data")
                    })
                })
                .collect::<Result<_, _>>()?;
            let HistoryPrompt { tokens: prompt, dropped } = match params.compat {
                Compat::Fixed => {
                    layout.prompt(&records, params.compat, room).map_err(|error| of_user(error, &user.user))?
                }
                Compat::Reference => HistoryPrompt { tokens: reference_prompt(layout, &records)?, dropped: 0 },
            };
            let seen: Vec<ItemId> =
                if params.exclude_seen { history.into_iter().cloned().collect() } else { Vec::new() };
            queries.push(Query {
                user: user.user.clone(),
                split,
                target: if split == Split::Test { user.test.clone() } else { user.valid.clone() },
                prompt,
                dropped,
                left_out: tids.entries_of_only(&seen),
                seen,
            });
        }
    }
    Ok(queries)
}

/// Names the user whose prompt cannot be made.
fn of_user(error: StageError, user: &UserId) -> StageError {
    match error {
        StageError::Params { message, help } => {
            StageError::Params { message: format!("user `{user}`: {message}"), help }
        }
        other => other,
    }
}

/// Prompts that are longer than the model's `positions`, as some of `compat: reference` are, which leaves nothing out.
///
/// # Errors
/// There are some.
pub fn check_positions(queries: &[Query], positions: usize, compat: Compat) -> Result<(), StageError> {
    let long = || queries.iter().filter(|query| query.prompt.len() > positions);
    let Some(longest) = long().max_by_key(|query| query.prompt.len()) else { return Ok(()) };
    let (count, all, tokens) = (long().count(), queries.len(), longest.prompt.len());
    let message = format!(
        "{count} of {all} prompts are longer than the model's {positions} positions; that of user `{}` has {tokens} tokens",
        longest.user
    );
    Err(StageError::params(message).help(match compat {
        Compat::Reference => {
            "leave `compat: reference` out, and the oldest items of long histories are left out; or give `sft_rec` a lower \
             `max_items`"
        }
        Compat::Fixed => "`max_length` in grlm.json is more than config.json has positions: they are of different models",
    }))
}

/// As the published evaluation asks: everything in the user's turn, and a trailing space.
fn reference_prompt(layout: &Layout, records: &[&TidRecord]) -> Result<Vec<u32>, StageError> {
    let mut text = layout.settings().instruction.clone();
    text.push('\n');
    for (index, record) in records.iter().enumerate() {
        let place = if index == 0 { Place::First } else { Place::Later };
        rec_text::push_text(&mut text, record, place, Compat::Reference);
    }
    text.push_str(TID_LABEL);
    text.push(' ');
    if layout.settings().template != ChatTemplate::None {
        text = format!("<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n");
    }
    Ok(layout.tokenizer().encode(&text)?)
}

/// The tokens that all prompts begin with, at least one token short of the shortest.
pub fn common_prefix(queries: &[Query]) -> &[u32] {
    let Some((first, rest)) = queries.split_first() else { return &[] };
    let common = rest.iter().fold(first.prompt.len().saturating_sub(1), |length, query| {
        let equal = first.prompt.iter().zip(&query.prompt).take(length).take_while(|(a, b)| a == b).count();
        equal.min(query.prompt.len().saturating_sub(1))
    });
    &first.prompt[..common]
}
