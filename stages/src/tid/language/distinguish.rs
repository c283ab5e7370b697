//! Rounds of questions about items that share a TID: the first in catalogue order keeps it, the others are asked for a
//! word that tells them apart. Their other words stay, whatever else an answer says.

use std::collections::{BTreeMap, BTreeSet, HashMap};

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
    /// The words of a TID but the last → the last words that are taken after them.
    last_words: HashMap<Vec<String>, BTreeSet<String>>,
    /// Items that share a TID, and the last words that they were told to be taken.
    open: BTreeMap<usize, BTreeSet<String>>,
    given_up: usize,
}

impl<'a> Rounds<'a> {
    pub fn new(
        places: &[usize],
        prompts: &'a [Vec<Message>],
        found: &'a mut [Found],
        taken: impl IntoIterator<Item = Vec<String>>,
    ) -> Self {
        let prompts = places.iter().copied().zip(prompts).collect();
        let mut rounds = Self {
            prompts,
            found,
            owners: HashMap::new(),
            last_words: HashMap::new(),
            open: BTreeMap::new(),
            given_up: 0,
        };
        for words in taken {
            rounds.own(words, None);
        }
        for place in 0..rounds.found.len() {
            let one = &rounds.found[place];
            if one.problem.is_some() || one.words.is_empty() {
                continue;
            }
            if rounds.owners.contains_key(&one.words) {
                rounds.open.insert(place, BTreeSet::new());
            } else {
                rounds.own(one.words.clone(), Some(place));
            }
        }
        rounds
    }

    fn own(&mut self, words: Vec<String>, owner: Option<usize>) {
        if let Some((last, others)) = words.split_last() {
            self.last_words.entry(others.to_vec()).or_default().insert(last.clone());
        }
        self.owners.insert(words, owner);
    }

    /// What is asked now, in catalogue order.
    pub fn questions(&mut self, title: &dyn Fn(usize) -> String) -> (Vec<usize>, Vec<Vec<Message>>) {
        let question = |(place, told): (&usize, &mut BTreeSet<String>)| {
            let mut conversation = (*self.prompts.get(place)?).clone();
            let words = &self.found[*place].words;
            let (_, others) = words.split_last()?;
            told.clone_from(self.last_words.get(others)?);
            let other = match self.owners.get(words).copied().flatten() {
                Some(owner) => format!(" ({})", title(owner).chars().take(SHOWN).collect::<String>()),
                None => String::new(),
            };
            let not = told.iter().map(String::as_str).collect::<Vec<_>>().join("`, `");
            conversation.push(Message::assistant(format!("[{}]", words.join(", "))));
            conversation.push(Message::user(format!(
                "Another product{other} has the same five words. Keep the first four, and put in place of the last one a \
                 word that fits this product and not the other; not `{not}`. {FORM}"
            )));
            Some((*place, conversation))
        };
        self.open.iter_mut().filter_map(question).unzip()
    }

    /// Takes the answer about the item at `place`, if there is one.
    pub fn take(&mut self, place: usize, answer: Option<Found>) {
        let answer = answer.filter(|answer| answer.problem.is_none());
        match answer.and_then(|answer| Some((self.told_apart(place, &answer)?, answer))) {
            Some((words, _)) if self.owners.contains_key(&words) => {
                // Another answer of this round had it: the next question names it.
            }
            Some((words, answer)) => {
                self.own(words.clone(), Some(place));
                self.found[place] = Found { words, ..answer };
                self.open.remove(&place);
            }
            None => {
                // The same question would have the same answer.
                self.open.remove(&place);
                self.given_up += 1;
            }
        }
    }

    /// The item's words with the answer's new one as the last; `None` where it has none that is new.
    fn told_apart(&self, place: usize, answer: &Found) -> Option<Vec<String>> {
        let (old, told) = (&self.found[place].words, self.open.get(&place)?);
        let new = answer.words.iter().rev().find(|word| !old.contains(word) && !told.contains(*word))?;
        let (_, others) = old.split_last()?;
        Some(others.iter().chain([new]).cloned().collect())
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
        // A new word stands behind the old ones, wherever the answer has it.
        rounds.take(1, Some(found("x a b c d")));
        rounds.take(3, Some(found("a b c d x")));
        rounds.take(4, None);
        let (asked, questions) = rounds.questions(&title);
        assert_eq!(asked, [3]);
        assert!(questions[0][2].content.contains("not `e`, `x`."), "{}", questions[0][2].content);
        rounds.take(3, Some(found("a b c d y")));
        assert!(rounds.questions(&title).0.is_empty());
        assert_eq!(rounds.left(), 1);
        assert_eq!((all[1].words.join(" ").as_str(), all[3].words.join(" ").as_str()), ("a b c d x", "a b c d y"));
    }

    #[test]
    fn a_question_names_every_word_that_the_group_has_taken() {
        let prompts: Vec<Vec<Message>> = (0..3).map(|p| vec![Message::user(format!("item {p}"))]).collect();
        let mut all = vec![found("a b c d e"), found("a b c d e"), found("a b c d g")];
        let given = "a b c d f".split(' ').map(str::to_owned).collect();
        let mut rounds = Rounds::new(&[0, 1, 2], &prompts, &mut all, [given]);
        let (_, questions) = rounds.questions(&|_| String::new());
        assert!(questions[0][2].content.contains("not `e`, `f`, `g`."), "{}", questions[0][2].content);
        rounds.take(1, Some(found("a b c d g")));
        assert_eq!((rounds.questions(&|_| String::new()).0.len(), rounds.left()), (0, 1), "it was told");
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
