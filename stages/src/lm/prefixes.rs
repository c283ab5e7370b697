//! `tokens: prefixes`: one token for each beginning of a TID behind which the catalogue leaves a choice, and one for the
//! whole TID.
//!
//! A TID is written by as many tokens as it takes to tell it from all others, two to three in most catalogues, and not by
//! one a word. Its last token is its own, so that a model knows items by an embedding each, as SASRec does, and yet
//! chooses them word by word. A token is named by its words, joined by `,`.

use std::collections::BTreeSet;

use grlm_nn::Tokenizer;

/// The names of the tokens that these TIDs need.
pub fn vocabulary(tids: &BTreeSet<Vec<&str>>) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = tids.iter().map(|tid| name(tid)).collect();
    // In sorted order a beginning with several ways on is what two neighbours share.
    for (tid, next) in tids.iter().zip(tids.iter().skip(1)) {
        let shared = tid.iter().zip(next).take_while(|(a, b)| a == b).count();
        if shared > 0 {
            names.insert(name(&tid[..shared]));
        }
    }
    names
}

/// The tokens of a TID: the one for unknown words if the vocabulary does not have it.
pub fn encode(tokenizer: &Tokenizer, words: &[&str]) -> Vec<u32> {
    let Some(whole) = tokenizer.id(&name(words)) else { return tokenizer.unknown().into_iter().collect() };
    let beginnings = (1..words.len()).filter_map(|count| tokenizer.id(&name(&words[..count])));
    beginnings.chain([whole]).collect()
}

fn name(words: &[&str]) -> String {
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tid_has_the_tokens_that_tell_it_from_others() {
        let tids: BTreeSet<Vec<&str>> = [
            ["soap", "bar", "olive", "hand", "mild"],
            ["soap", "bar", "olive", "hand", "soft"],
            ["soap", "bar", "lavender", "hand", "mild"],
            ["mask", "clay", "green", "face", "vegan"],
            ["mask", "hair", "green", "argan", "vegan"],
            ["brush", "boar", "wood", "round", "small"],
        ]
        .map(Vec::from)
        .into();
        let names = vocabulary(&tids);
        assert_eq!(names.len(), 6 + 3);
        let tokenizer = Tokenizer::of_words(names.iter().map(String::as_str)).unwrap();
        let spelled = |tid: &str| {
            let words: Vec<&str> = tid.split(' ').collect();
            tokenizer.decode(&encode(&tokenizer, &words)).unwrap()
        };
        assert_eq!(spelled("brush boar wood round small"), "brush,boar,wood,round,small");
        assert_eq!(spelled("mask clay green face vegan"), "mask mask,clay,green,face,vegan");
        assert_eq!(spelled("soap bar lavender hand mild"), "soap,bar soap,bar,lavender,hand,mild");
        let deepest = "soap,bar soap,bar,olive,hand soap,bar,olive,hand,soft";
        assert_eq!(spelled("soap bar olive hand soft"), deepest);
        assert_eq!(spelled("soap bar olive hand new"), "<unk>");
        // As the tokenizer itself reads it.
        let words: Vec<&str> = "soap bar olive hand soft".split(' ').collect();
        assert_eq!(tokenizer.encode(deepest).unwrap(), encode(&tokenizer, &words));
        let sequences: BTreeSet<Vec<u32>> = tids.iter().map(|tid| encode(&tokenizer, tid)).collect();
        assert_eq!(sequences.len(), tids.len());
    }
}
