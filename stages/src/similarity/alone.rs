//! Items without neighbours: why each has none, told by reason with a few of their ids.

use crate::{Compat, StageContext, artifact::Item};

/// Ids that are told of each reason.
const SHOWN: usize = 3;

/// Why an item is near to no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alone {
    /// There is nothing to compare.
    NoText,
    /// None of its words counts.
    NoWord,
    /// The model had no answer for its text.
    NoAnswer,
    /// The model's vector is zero.
    Zero,
    /// It has a vector, and shares nothing with any other.
    Unlike,
}

impl Alone {
    const ALL: [Self; 5] = [Self::NoAnswer, Self::Zero, Self::NoText, Self::NoWord, Self::Unlike];

    /// Of `one` item, or of several.
    fn in_words(self, one: bool) -> &'static str {
        let [of_one, of_several] = match self {
            Self::NoText => ["it has no text", "they have no text"],
            Self::NoWord => [
                "none of its words counts (stop words, too rare or too common)",
                "none of their words counts (stop words, too rare or too common)",
            ],
            Self::NoAnswer => ["the encoder failed for it", "the encoder failed for them"],
            Self::Zero => ["the encoder's vector of it is zero", "the encoder's vectors of them are zero"],
            Self::Unlike => ["its text is unlike any other", "their texts are unlike any other"],
        };
        if one { of_one } else { of_several }
    }

    /// Whether it is the model's doing, and not the catalogue's.
    fn is_of_the_model(self) -> bool {
        matches!(self, Self::NoAnswer | Self::Zero)
    }
}

/// Tells which items have nothing in `found`, by what `why` says of them. `reference` goes on to fill their lists up.
pub fn tell(cx: &mut StageContext, items: &[Item], found: &[Vec<(u32, f32)>], why: &[Option<Alone>], compat: Compat) {
    let what = |one: bool| match (compat.is_reference(), one) {
        (true, true) => "is near to none, and gets any others",
        (true, false) => "are near to none, and get any others",
        (false, true) => "has no neighbours",
        (false, false) => "have no neighbours",
    };
    let alone: Vec<(&Item, Alone)> = items
        .iter()
        .zip(found)
        .zip(why)
        .filter(|((_, near), _)| near.is_empty())
        .map(|((item, _), why)| (item, why.unwrap_or(Alone::Unlike)))
        .collect();
    for reason in Alone::ALL {
        let ids: Vec<String> =
            alone.iter().filter(|(_, why)| *why == reason).map(|(i, _)| format!("`{}`", i.id)).collect();
        if ids.is_empty() {
            continue;
        }
        let more = if ids.len() > SHOWN { ", …" } else { "" };
        let one = ids.len() == 1;
        let text = format!(
            "{} of {} items {}: {} ({}{more})",
            ids.len(),
            items.len(),
            what(one),
            reason.in_words(one),
            ids[..ids.len().min(SHOWN)].join(", ")
        );
        if reason.is_of_the_model() { cx.warn(text) } else { cx.info(text) }
    }
}
