//! Rounds of questions about items that share a TID: the first in catalogue order keeps it, the others are asked for a
//! word that tells them apart.

use std::collections::{BTreeMap, HashMap};

use grlm_nn::chat::Message;

use super::{super::Found, dialogue::FORM};

/// Characters of another item's title that are shown.
const SHOWN: usize = 150;

/// Who has which TID, and what was tried.
pub struct Rounds<'a> {
    /// Place of an item → its prompt.
    prompts: HashMap<usize, &'a Vec<Message>>,
    found: &'a mut [Found],
    /// TID → the item that has it, where it is not a given one.
    owners: HashMap<Vec<String>, Option<usize>>,
    /// Items that share a TID, and the last words that did not help.
    open: BTreeMap<usize, Vec<String>>,
    given_up: usize,
}

impl<'a> Rounds<'a> {
    pub fn new(
        places: &[usize],
        prompts: &'a [Vec<Message>],
        found: &'a mut [Found],
        taken: impl IntoIterator<Item = Vec<String>>,
    ) -> Self {
        let mut owners: HashMap<Vec<String>, Option<usize>> = taken.into_iter().map(|words| (words, None)).collect();
        let mut open = BTreeMap::new();
        for (place, one) in found.iter().enumerate().filter(|(_, one)| one.problem.is_none() && !one.words.is_empty()) {
            if owners.contains_key(&one.words) {
                open.insert(place, Vec::new());
            } else {
                owners.insert(one.words.clone(), Some(place));
            }
        }
        let prompts = places.iter().copied().zip(prompts).collect();
        Self { prompts, found, owners, open, given_up: 0 }
    }

    /// What is asked now, in catalogue order.
    pub fn questions(&self, title: &dyn Fn(usize) -> String) -> (Vec<usize>, Vec<Vec<Message>>) {
        let question = |(place, tried): (&usize, &Vec<String>)| {
            let mut conversation = (*self.prompts.get(place)?).clone();
            let words = &self.found[*place].words;
            let other = match self.owners.get(words).copied().flatten() {
                Some(owner) => format!(" ({})", title(owner).chars().take(SHOWN).collect::<String>()),
                None => String::new(),
            };
            let last = words.last().map_or("", String::as_str);
            let mut not: Vec<&str> = vec![last];
            not.extend(tried.iter().map(String::as_str).filter(|word| *word != last));
            conversation.push(Message::assistant(format!("[{}]", words.join(", "))));
            conversation.push(Message::user(format!(
                "Another product{other} has the same five words. Keep the first four, and put in place of the last one a \
                 word that fits this product and not the other; not `{}`. {FORM}",
                not.join("`, `")
            )));
            Some((*place, conversation))
        };
        self.open.iter().filter_map(question).unzip()
    }

    /// Takes the answer about the item at `place`, if there is one.
    pub fn take(&mut self, place: usize, answer: Option<Found>) {
        let Some(answer) = answer.filter(|answer| answer.problem.is_none()) else {
            // The same question would have the same answer.
            self.open.remove(&place);
            self.given_up += 1;
            return;
        };
        if self.owners.contains_key(&answer.words) {
            if let (Some(tried), Some(last)) = (self.open.get_mut(&place), answer.words.last()) {
                if tried.contains(last) || self.found[place].words.last() == Some(last) {
                    self.open.remove(&place);
                    self.given_up += 1;
                } else {
                    tried.push(last.clone());
                }
            }
        } else {
            self.owners.insert(answer.words.clone(), Some(place));
            self.found[place] = answer;
            self.open.remove(&place);
        }
    }

    /// How many items still share their TID with another.
    pub fn left(&self) -> usize {
        self.open.len() + self.given_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(words: &str) -> Found {
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        let problem = (words.len() != 5).then(|| "too few".to_owned());
        Found { output: words.join(" "), words, problem }
    }

    #[test]
    fn later_items_are_asked_until_their_tid_is_their_own() {
        let places = [0, 1, 2, 3, 4];
        let prompts: Vec<Vec<Message>> = places.iter().map(|p| vec![Message::user(format!("item {p}"))]).collect();
        let mut all =
            vec![found("a b c d e"), found("a b c d e"), found("a b"), found("a b c d e"), found("g g g g g")];
        let given = vec!["g"; 5].into_iter().map(str::to_owned).collect::<Vec<_>>();
        let mut rounds = Rounds::new(&places, &prompts, &mut all, [given]);
        let title = |place: usize| format!("title {place}");
        let (asked, questions) = rounds.questions(&title);
        assert_eq!(asked, [1, 3, 4]);
        assert_eq!(questions[0][0].content, "item 1");
        assert_eq!(questions[0][1].content, "[a, b, c, d, e]");
        assert!(questions[0][2].content.starts_with("Another product (title 0) has the same five words."));
        assert!(questions[2][2].content.starts_with("Another product has the same five words."));
        rounds.take(1, Some(found("a b c d x")));
        rounds.take(3, Some(found("a b c d x")));
        rounds.take(4, None);
        let (asked, questions) = rounds.questions(&title);
        assert_eq!(asked, [3]);
        assert!(questions[0][2].content.contains("not `e`, `x`."), "{}", questions[0][2].content);
        rounds.take(3, Some(found("a b c d y")));
        assert!(rounds.questions(&title).0.is_empty());
        assert_eq!(rounds.left(), 1);
        assert_eq!((all[1].output.as_str(), all[3].output.as_str()), ("a b c d x", "a b c d y"));
    }

    #[test]
    fn an_answer_that_repeats_itself_is_given_up() {
        let prompts = vec![vec![Message::user("0")], vec![Message::user("1")]];
        let mut all = vec![found("a b c d e"), found("a b c d e")];
        let mut rounds = Rounds::new(&[0, 1], &prompts, &mut all, []);
        rounds.take(1, Some(found("a b c d e")));
        assert_eq!((rounds.questions(&|_| String::new()).0.len(), rounds.left()), (0, 1));
    }
}
